"""How one replica spreads over GPUs: attention by heads or sequences, experts by width or whole."""

from dataclasses import dataclass

from costmodel.architecture import Architecture
from costmodel.errors import ConfigError, NotApplicableError
from costmodel.mlps import MoE


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Degrees of one replica; ``tp * dp`` GPUs hold it.

    tp      GPUs over which the heads of one sequence are spread
    dp      groups of them with sequences of their own (attention data parallelism)
    moe_tp  GPUs over which the width of one expert is spread
    ep      groups of experts
    """

    tp: int = 1
    dp: int = 1
    moe_tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "moe_tp", "ep"):
            value = getattr(self, name)
            if not 1 <= value <= 4096:
                raise ConfigError(f"{name}: expected 1 to 4096 GPUs, got {value}")

    @property
    def n_gpus(self) -> int:
        """GPUs of one replica."""
        return self.tp * self.dp

    def for_model(self, architecture: Architecture) -> "Deployment":
        """The same with expert degrees that fit: none for a dense model, all GPUs for a sparse one.

        Raises ``NotApplicableError`` where the experts do not divide.
        """
        experts = [m for m, _ in architecture.mlp_groups if isinstance(m, MoE)]
        if not experts:
            return Deployment(tp=self.tp, dp=self.dp)
        degrees = self.moe_tp * self.ep
        own = (
            self
            if degrees == self.n_gpus
            else Deployment(tp=self.tp, dp=self.dp, moe_tp=self.n_gpus // self.ep or 1, ep=self.ep)
        )
        if own.moe_tp * own.ep != own.n_gpus:
            raise NotApplicableError(
                f"moe_tp {self.moe_tp} x ep {self.ep} is not the number of GPUs, {self.n_gpus}"
            )
        for moe in experts:
            if moe.n_experts % own.ep:
                raise NotApplicableError(f"{moe.n_experts} experts do not divide by ep = {own.ep}")
        return own
