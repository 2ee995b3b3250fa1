"""What a model keeps keys and values in while it decodes: `generate --kv-cache`."""

from typing import Any, get_args

from models.attention import Attention
from models.attention_config import Stored
from models.decoder import Decoder
from runner.machine.errors import ConfigError


def store_keys_and_values(model: Any, given: str) -> None:
    """Let the states of `model` keep the keys and values of all tokens in `given`.

    Raises:
        ConfigError: `given` is no format of them, or the model keeps none.
    """
    if given not in get_args(Stored):
        raise ConfigError(f"kv_cache={given!r} is none of: {', '.join(get_args(Stored))}")
    attention = [m for m in model.modules() if isinstance(m, Attention) and m.cfg.window is None]
    if not isinstance(model, Decoder) or not attention:
        raise ConfigError(
            f"kv_cache={given}: this {type(model).__name__} keeps no keys and values of all "
            "tokens, its state does not grow; leave it out"
        )
    model.stored = given  # type: ignore[assignment]
