"""The encoder, and the model, that the settings ask for."""

from torch import Tensor

from longer.encoder_settings import Din, FullTransformer, Hstu, Sim, SumPooling, Twin, UserEmbedding, UserTower
from longer.model.encoders.hstu import HstuEncoder
from longer.model.encoders.pooling import DinEncoder, SumPoolingEncoder
from longer.model.encoders.ranker import EncoderRanker, SequenceEncoder
from longer.model.encoders.search import SimEncoder, TwinEncoder
from longer.model.encoders.transformer import TransformerEncoder, UserEmbeddingEncoder, UserTowerEncoder
from longer.model.longer import Longer
from longer.model.ranker import Ranker
from longer.model_settings import ModelSettings
from longer.schema import EventSchema
from longer.training_settings import TaskSettings


def make_model(settings: ModelSettings, schema: EventSchema, tasks: tuple[TaskSettings, ...]) -> Ranker:
    """LONGER, or the encoder chosen by `settings.encoder`, with fresh weights from torch's global generator."""
    return (Longer if settings.encoder.kind == "longer" else EncoderRanker)(settings, schema, tasks)


def make_encoder(
    settings: ModelSettings, schema: EventSchema, tasks: tuple[TaskSettings, ...], request_D: Tensor
) -> SequenceEncoder | None:
    """What reads the history for an `EncoderRanker`; None where nothing does.

    `request_D` tells candidates from events, which encoders that begin as a search do not look at.
    """
    match settings.encoder:
        case SumPooling():
            return SumPoolingEncoder(settings)
        case Din() as encoder:
            return DinEncoder(settings, encoder)
        case Sim() as encoder:
            return SimEncoder(settings, encoder, request_D)
        case Twin() as encoder:
            return TwinEncoder(settings, encoder, schema, request_D)
        case FullTransformer(num_layers=num_layers):
            return TransformerEncoder(settings, num_layers, request_D)
        case Hstu(num_layers=num_layers):
            return HstuEncoder(settings, num_layers, request_D)
        case UserTower(num_layers=num_layers):
            return UserTowerEncoder(settings, num_layers)
        case UserEmbedding():
            return UserEmbeddingEncoder(settings, EncoderRanker(upstream_settings(settings), schema, tasks))
    return None


def upstream_settings(settings: ModelSettings) -> ModelSettings:
    """Those of the user tower whose vectors a model with the encoder `user_embedding` reads."""
    assert isinstance(settings.encoder, UserEmbedding)
    tower = UserTower(num_layers=settings.encoder.num_layers)
    return settings.model_copy(update={"encoder": tower, "interactions": False})
