// The form in which the terms of a problem come from Python: one list of numbers, term after term.
//
// src/sbert_kernels/backends/cpu/wire.py writes it, from the fields of Term in problems/contrastive.py in their order:
// a number as one double (a bool as 0 or 1, a name as its place among the names that are allowed), a number that may be
// missing as a tuple of at most one, a tuple as its length and then its numbers. The layout says in words which
// fields those are; it travels with each call, and a library that was built for another one refuses.
#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <string_view>
#include <vector>

#include "problem.h"

namespace sbert_kernels {

constexpr std::string_view kTermLayout =
    "rows_are_queries bool, columns_are_queries bool, columns int, softmax int, own_column int, positive int[], "
    "excluded int[], duplicates keep|mask|positive, guided bool, hardness float, hard_everywhere bool, "
    "hardness_exceptions int[]";

class TermReader {
 public:
  explicit TermReader(c10::ArrayRef<double> numbers) : numbers_(numbers) {}

  std::vector<Term> read() {
    std::vector<Term> terms;
    while (at_ < numbers_.size()) terms.push_back(read_term());
    return terms;
  }

 private:
  Term read_term() {
    Term term;
    term.rows_are_queries = number() != 0;
    term.columns_are_queries = number() != 0;
    term.columns = integer();
    term.softmax = integer();
    term.own_column = integer();
    for (const int64_t start : integers()) term.pairs.push_back({start, true, false});
    term.excluded = integers();
    const int64_t duplicates = integer();
    TORCH_CHECK(0 <= duplicates && duplicates <= 2, "duplicates must be 0, 1 or 2, got ", duplicates);
    term.duplicates = static_cast<DuplicateRule>(duplicates);
    term.guided = number() != 0;
    term.hardness = number();
    term.hard_everywhere = number() != 0;
    for (const int64_t start : integers()) term.pairs.push_back({start, false, !term.hard_everywhere});
    return term;
  }

  double number() {
    TORCH_CHECK(at_ < numbers_.size(), "terms is cut short after ", numbers_.size(), " numbers");
    return numbers_[at_++];
  }
  int64_t integer() { return static_cast<int64_t>(number()); }
  std::vector<int64_t> integers() {
    std::vector<int64_t> found;
    const int64_t length = integer();
    TORCH_CHECK(length >= 0, "a length must not be negative, got ", length);
    for (int64_t left = length; left > 0; --left) found.push_back(integer());
    return found;
  }

  c10::ArrayRef<double> numbers_;
  size_t at_ = 0;
};

}  // namespace sbert_kernels
