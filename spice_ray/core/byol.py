"""BYOL (Grill et al. 2020): a view's prediction meets the momentum encoder's projection of the other; no negatives."""

from torch import Tensor, nn
from torch.nn import functional as F

from spice_ray.core.encoders import Encoder, LaneBatchNorm2d, OfLanes, interleaved, lane_after_lane
from spice_ray.core.order import seeded


class PredictingEncoder(nn.Module):
    """An encoder with BYOL's projector and predictor, both of two layers with batch norm between them."""

    def __init__(self, encoder: Encoder, projection_dim: int, key: int) -> None:
        super().__init__()
        self.encoder = encoder
        with seeded(key):
            hidden = 2 * encoder.embed_dim
            self.projector = TwoLayers(encoder.embed_dim, hidden, projection_dim)
            self.predictor = TwoLayers(projection_dim, hidden, projection_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Predict the other view's projection of normalised images, (B, 3, S, S): unit rows, float32, (B, P)."""
        return F.normalize(self.predictor(self._projected(images)).float(), dim=1)

    def project(self, images: Tensor) -> Tensor:
        """What is predicted: unit rows, float32, (B, P)."""
        return F.normalize(self._projected(images).float(), dim=1)

    def _projected(self, images: Tensor) -> Tensor:
        _, pooled = self.encoder(images)
        projected: Tensor = self.projector(pooled)
        return projected


class TwoLayers(OfLanes, nn.Module):
    """A linear layer, batch norm of each lane, ReLU and another linear layer."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.norm = LaneBatchNorm2d(hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, inputs), interleaved over lanes, to (B, outputs)."""
        lanes = self.lanes if self.training else 1
        pixels = self.first(lane_after_lane(rows, lanes))[:, :, None, None]
        hidden = interleaved(self.norm(pixels).flatten(1).relu(), lanes)
        outputs: Tensor = self.second(hidden)
        return outputs


def prediction_loss(predictions: Tensor, projections: Tensor) -> Tensor:
    """Mean squared distance of unit rows, (B, P) each: 2 - 2 cos, a scalar from 0 to 4 (BYOL's eq. 2)."""
    return (predictions - projections).square().sum(dim=1).mean()
