"""Starts the kernel that turns a softmax's sums into losses, logsumexps and the positives' gradients, for some rows."""

from __future__ import annotations

from torch import Tensor

from ..launching import Prepared, cdiv
from . import tiles
from .arguments import Sums
from .call import Call
from .plan import Plan, SoftmaxPlan
from .softmax_statistics import softmax_statistics


class Statistics:
    """Knows the launch for the rows ``begin`` .. ``end`` of a softmax, whose sums come in so many ``splits``."""

    def __init__(self, plan: Plan, softmax: SoftmaxPlan, begin: int, end: int, splits: int) -> None:
        self.softmax, self.rows, self.gradients = softmax, slice(begin, end), plan.gradients
        self.whole = end - begin == plan.n
        config = tiles.statistics_config(plan.target)
        self.start = Prepared(
            softmax_statistics,
            (cdiv(end - begin, config["BLOCK_N"]),),
            config=config,
            n=end - begin,
            splits=splits,
            **_positive_strides(plan, softmax),
            d_positive_stride=plan.n,
            WEIGHTS=plan.prefix_weights,
            ADD=softmax.add,
            ADD_D_POSITIVE=softmax.add_d_positive,
        )

    def positives(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Returns the similarities of the rows' positive pairs, (K, n): one or two."""
        found = [call.positives[name][:, self.rows] for name in self.softmax.positives]
        return found[0], found[1] if len(found) > 1 else None

    def __call__(self, call: Call, memory: dict[str, Tensor], sums: Sums) -> None:
        """Writes the losses, and into ``memory`` what of it has a place there."""
        positive, second = self.positives(call)
        d_positive, d_second = (None if name is None else call.d_positives[name] for name in self.softmax.d_positives)
        self.start(
            sums=sums,
            shift=call.shift,
            positive=positive,
            second_positive=second,
            row_weight=self._of(call.row_weights),
            scale=call.scale,
            scale_tensor=call.scale_tensor,
            losses=self._of(call.losses),
            logsumexp=memory.get("logsumexp"),
            coefficient=memory.get("coefficient"),
            positive_share=memory.get("positive_share") if self.gradients else None,
            d_positive=self._of(d_positive),
            d_second_positive=self._of(d_second),
            scale_gradient=self._of(call.scale_gradient),
        )

    def _of(self, vector: Tensor | None) -> Tensor | None:
        return vector if vector is None or self.whole else vector[..., self.rows]


def _positive_strides(plan: Plan, softmax: SoftmaxPlan) -> dict[str, int]:
    """Returns how far prefixes of the positives' similarities are apart; the gathered ones are of all ranks."""
    everyone = plan.all_queries
    strides = {"positive": plan.n, "gathered_positive": 0 if everyone is None else everyone.rows}
    first, second = (*(strides[name] for name in softmax.positives), 0)[:2]
    return {"positive_stride": first, "second_positive_stride": second}
