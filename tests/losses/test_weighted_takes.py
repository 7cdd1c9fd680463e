"""WeightedLoss takes each loss of sentence-transformers that needs embeddings and labels only; else it says why not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.sparse_encoder import losses as sparse
from torch import Tensor, nn

from sbert_kernels import losses
from sbert_kernels.losses import WeightedLoss
from support.embedded import Embedded
from support.gradients import total, value_and_gradients
from support.numbers import assert_close
from support.texts import text_features

ROWS, WIDTH = 7, 32
# A new loss of sentence-transformers has to be put into one of the two tables below.
CLASSES = {
    name: getattr(package, name)
    for package in (stock, sparse)
    for name in package.__all__
    if issubclass(getattr(package, name), nn.Module)
}

CLASS_IDS = torch.tensor([0, 1, 0, 2, 1, 2, 0])
SCORES = torch.tensor([0.1, 0.9, 0.4, 0.4, 0.7, 0.0, 1.0], dtype=torch.float64)
TEACHER = torch.randn(ROWS, 2, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
# By class: columns of texts, labels, and options where the default ones do not do.
TAKEN: dict[str, tuple[Any, ...]] = {
    "AnglELoss": (2, SCORES),
    "BatchAllTripletLoss": (1, CLASS_IDS),
    "BatchHardSoftMarginTripletLoss": (1, CLASS_IDS),
    "BatchHardTripletLoss": (1, CLASS_IDS),
    "BatchSemiHardTripletLoss": (1, CLASS_IDS),
    "CoSENTLoss": (2, SCORES),
    "ContrastiveLoss": (2, CLASS_IDS.clamp(max=1)),
    "CosineSimilarityLoss": (2, SCORES),
    "DistillKLDivLoss": (3, torch.stack([SCORES, 1 - SCORES], 1)),
    "EmbedDistillLoss": (2, TEACHER[..., :16], {"projection_dim": 16, "distance_metric": "l2"}),
    "GlobalOrthogonalRegularizationLoss": (2, None),
    "MSELoss": (3, TEACHER[:, 0]),
    "MarginMSELoss": (3, SCORES),
    "MegaBatchMarginLoss": (2, None, {"use_mini_batched_version": False, "positive_margin": 1.5}),
    "MultipleNegativesRankingLoss": (3, None),
    "MultipleNegativesSymmetricRankingLoss": (2, None),
    "OnlineContrastiveLoss": (2, CLASS_IDS.clamp(max=1)),
    "SoftmaxLoss": (2, CLASS_IDS, {"embedding_dimension": WIDTH, "num_labels": 3}),
    "SparseAnglELoss": (2, SCORES),
    "SparseCoSENTLoss": (2, SCORES),
    "SparseCosineSimilarityLoss": (2, SCORES),
    "SparseDistillKLDivLoss": (3, torch.stack([SCORES, 1 - SCORES], 1)),
    "SparseMSELoss": (2, TEACHER),
    "SparseMarginMSELoss": (3, SCORES),
    "SparseMultipleNegativesRankingLoss": (2, None),
    "SparseTripletLoss": (3, None, {"triplet_margin": 30.0}),
    "TripletLoss": (3, None, {"triplet_margin": 30.0}),
}
# By class: why, and what its constructor gets beside the model.
GUIDE = object()
REFUSED: dict[str, tuple[Any, ...]] = {
    "AdaptiveLayerLoss": ("wraps another loss: put it around the WeightedLoss", stock.CoSENTLoss),
    "CSRLoss": ("wraps another loss",),
    "CSRReconstructionLoss": (r"takes \(outputs\); wanted are \(embeddings, labels\)",),
    "CachedGISTEmbedLoss": ("gradient cache of its own: give GISTEmbedLoss", GUIDE),
    "CachedMultipleNegativesRankingLoss": ("gradient cache of its own: give MultipleNegativesRankingLoss",),
    "CachedMultipleNegativesSymmetricRankingLoss": ("cache of its own: give MultipleNegativesSymmetricRankingLoss",),
    "CachedSpladeLoss": ("wraps another loss", sparse.SparseCoSENTLoss, 0.1),
    "ContrastiveTensionLoss": (r"encodes the texts with a second model \(model1\)",),
    "ContrastiveTensionLossInBatchNegatives": (r"encodes the texts with a second model \(model1\)",),
    "FlopsLoss": (r"takes \(embeddings\); wanted are \(embeddings, labels\)",),
    "GISTEmbedLoss": (r"encodes the texts with a second model \(guide\)", GUIDE),
    "Matryoshka2dLoss": ("wraps another loss", stock.CoSENTLoss, [WIDTH, 8]),
    "MatryoshkaLoss": ("wraps another loss", stock.BatchHardTripletLoss, [WIDTH, 8]),
    "MegaBatchMarginLoss": ("gradient cache of its own: give it use_mini_batched_version=False, and mini_batch_size=",),
    "SpladeLoss": ("wraps another loss", sparse.SparseCoSENTLoss, 0.1),
}
AT_THE_FIRST_BATCH = {"DenoisingAutoEncoderLoss": "DenoisingAutoEncoderLoss reads 'input_ids' of the texts"}


@pytest.fixture
def model() -> nn.Module:
    """Encodes vectors of texts by a linear map."""

    class Linear(Embedded):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(8, WIDTH, dtype=torch.float64)

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"sentence_embedding": self.linear(features["vectors"])}

        def get_embedding_dimension(self) -> int:
            return WIDTH

    return Linear()


def columns_of(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    return [
        {
            "vectors": torch.randn(ROWS, 8, generator=generator, dtype=torch.float64),
            "attention_mask": torch.ones(ROWS, 2, dtype=torch.int64),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def transformer(bert: Any) -> Any:
    return bert(torch.float32)


def gradients(loss: nn.Module, value: Any) -> list[Tensor]:
    """Returns a value, and what its backward pass leaves at every parameter of a loss and of its model."""
    return value_and_gradients(lambda: total(value), loss.parameters())


def test_every_class_is_known() -> None:
    assert set(CLASSES) == set(TAKEN) | set(REFUSED) | set(AT_THE_FIRST_BATCH)


@pytest.mark.filterwarnings("ignore:Labels and scores")
@pytest.mark.parametrize("name", TAKEN)
def test_equals_the_loss_alone(model: Any, name: str) -> None:
    """Its value and all gradients, in one piece and over the gradient cache, in which labels may be embeddings too."""
    columns, labels, *options = TAKEN[name]
    loss = CLASSES[name](model, **(options[0] if options else {})).double()
    features = columns_of(columns)
    if name.startswith("Sparse") and name != "SparseMSELoss":  # "should not be used alone"
        embeddings = [model(dict(column))["sentence_embedding"] for column in features]
        alone = loss.compute_loss_from_embeddings(embeddings, labels)
    else:
        alone = loss([dict(column) for column in features], labels)
    alone = [0.5 * x for x in gradients(loss, alone)]
    assert alone[0] > 0
    for cache in ({}, {"mini_batch_size": 3}):
        weighted = WeightedLoss(model, {"entry": (loss, 0.5)}, **cache)
        own = gradients(weighted, weighted([dict(column) for column in features], labels))
        order = {id(parameter): index for index, parameter in enumerate(weighted.parameters())}
        own = [own[0], *(own[1 + order[id(parameter)]] for parameter in loss.parameters())]
        assert_close(own, alone, replayed=bool(cache))
    assert model in loss.children()


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_the_reason(transformer: Any, name: str) -> None:
    message, *arguments = REFUSED[name]
    made = [
        copy.deepcopy(transformer) if x is GUIDE else x(transformer) if isinstance(x, type) else x for x in arguments
    ]
    with pytest.raises(ValueError, match=rf"losses\['entry'\] is a {name}, w.*{message}"):
        WeightedLoss(transformer, {"entry": (CLASSES[name](transformer, *made), 1.0)})


def test_a_loss_that_reads_the_tokens_says_so_at_the_first_batch(bert: Any) -> None:
    model = bert(torch.float32)
    loss = stock.DenoisingAutoEncoderLoss(model)
    weighted = WeightedLoss(model, {"entry": (loss, 1.0)})
    with pytest.raises(ValueError, match=AT_THE_FIRST_BATCH["DenoisingAutoEncoderLoss"]):
        weighted(text_features(model), None)
    assert loss.encoder is model


class Own(nn.Module):
    """A user's loss, which has a ``forward`` alone and does what many do with their model there."""

    def __init__(self, model: Any, optional: str | None = None) -> None:
        super().__init__()
        self.encoder, self.optional = model, optional

    def forward(self, sentence_features: Any, labels: Tensor) -> Tensor:
        if self.optional == "copy":
            sentence_features = [dict(column) for column in sentence_features]
        elif self.optional is not None:
            sentence_features[0].get(self.optional)
        a, b = (self.encoder(column)["sentence_embedding"] for column in sentence_features)
        return ((a - b).square().sum(1) * labels).mean() / self.encoder.get_embedding_dimension()


def test_a_loss_with_a_forward_alone(model: Any) -> None:
    loss = Own(model)
    expected = gradients(loss, loss(columns_of(2), SCORES))
    weighted = WeightedLoss(model, {"own": (loss, 1.0)})
    assert_close(gradients(weighted, weighted(columns_of(2), SCORES)), expected)
    for optional, message in (
        ("attention_mask", "Own reads 'attention_mask' of the texts, but a WeightedLoss has"),
        ("copy", "Own encodes texts of its own making"),
    ):
        weighted = WeightedLoss(model, {"own": (Own(model, optional), 1.0)})
        with pytest.raises(ValueError, match=message):
            weighted(columns_of(2), SCORES)


@pytest.mark.parametrize("package", [losses, stock])
def test_a_teacher_s_embeddings_are_cut_with_those_of_the_model(model: Any, package: Any) -> None:
    """MatryoshkaLoss around the loss, with and without a gradient cache."""
    entries = {
        "teacher": (stock.MSELoss(model), 1.0),
        "ranking": (losses.MultipleNegativesRankingLoss(model), 0.25),
    }
    expected = [0.0] * 3
    for width in (WIDTH, 8):
        columns = [F.normalize(model(column)["sentence_embedding"][:, :width]) for column in columns_of(2)]
        value = F.mse_loss(torch.stack(columns, 1), TEACHER[..., :width])
        value = value + 0.25 * entries["ranking"][0].compute_loss_from_embeddings(columns)
        expected = [a + b for a, b in zip(expected, gradients(model, value), strict=True)]
    for cache in ({}, {"mini_batch_size": 3}):
        loss = package.MatryoshkaLoss(model, WeightedLoss(model, entries, **cache), [WIDTH, 8])
        assert_close(gradients(loss, loss(columns_of(2), TEACHER)), expected, replayed=bool(cache))


class ReadsTheModel(nn.Module):
    """A loss of the user's own that looks at the parameters, the modules and the mode of its model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: list[dict[str, Tensor]], labels: Any) -> Tensor:
        total = sum(parameter.pow(2).sum() for parameter in self.model.parameters())
        first = self.model(features[0])["sentence_embedding"].sum()
        assert isinstance(self.model, SentenceTransformer)
        return total * len(self.model) * (2.0 if self.model.training else 1.0) + first


def test_a_loss_of_ones_own_sees_its_model_as_it_is(bert: Any) -> None:
    model = bert().eval()
    loss = ReadsTheModel(model)
    alone = loss(text_features(model), None)
    mixed = WeightedLoss(model, {"own": (loss, 1.0)})(text_features(model), None)
    assert mixed["own"].item() == pytest.approx(alone.item(), rel=1e-12)
    assert loss.model is model


def test_an_error_of_a_part_names_it(bert: Any) -> None:
    model = bert()
    loss = WeightedLoss(model, {"triplets": (stock.TripletLoss(model), 1.0)})
    with pytest.raises(ValueError, match="not enough values") as raised:
        loss(text_features(model), None)
    if hasattr(raised.value, "__notes__"):
        assert raised.value.__notes__ == ["Raised by losses['triplets'], a TripletLoss."]


def test_errors_do_not_print_the_model(model: Any) -> None:
    loss = stock.CoSENTLoss(model)
    for entries, named in (
        ({"x": loss}, "got CoSENTLoss"),
        ({"x": [loss]}, r"got \[CoSENTLoss\]"),
        ({"x": (stock.CoSENTLoss, 1.0)}, "an nn.Module, got the class CoSENTLoss"),
        ({"x": ((loss, loss), 1.0)}, r"an nn.Module, got \(CoSENTLoss, CoSENTLoss\)"),
        ({"x": (loss, loss)}, "tensor of one element, got CoSENTLoss"),
        ([(loss, 1.0)], r"got \[\(CoSENTLoss, 1.0\)\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=named) as raised:
            WeightedLoss(model, entries)
        assert len(str(raised.value)) < 200
