"""One rank of a tensor-parallel point."""

from torch import distributed

from costmodel.architecture import Architecture
from measure.engine import TORCH_DTYPES, Decoder, Weights, random_weights
from measure.parallel.decoder import ParallelDecoder
from measure.parallel.shards import shard_weights, share_of
from measure.sessions import TorchSession, weights_of


class ParallelSession(TorchSession):
    """As the plain session, with this rank's share of the tensors.

    Random weights are drawn at the share's sizes, alike on all ranks: a model that is too large
    for one device never exists whole.
    """

    def hold_shapes(self) -> str:
        """Ranks would have to replay together."""
        return "steps of several processes are not captured here"

    def _model(self) -> Architecture:
        return share_of(self.point.executed, self.point.tp)

    def _weights(self) -> Weights:
        point = self.point
        if point.weights is not None:
            whole = weights_of(point, self.device)
            return shard_weights(point.executed, whole, point.tp, distributed.get_rank())
        dtype = TORCH_DTYPES[point.dtype]
        return random_weights(self.model, dtype, self.device, point.seed, numerics=self.numerics)

    def _decoder(self, n_positions: int) -> Decoder:
        return ParallelDecoder(
            self.model,
            self.weights,
            n_positions=n_positions,
            numerics=self.numerics,
            vocab_size=self.point.executed.vocab_size,
        )
