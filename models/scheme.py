"""Names of quantisation schemes: what weights are stored in, how they are rounded, activations.

    [METHOD-]FORMAT[-dynamic], or as-trained, of a model that is trained rounded

    FORMAT   int8, int2 to int8 in groups with -gN and with a zero point -asym (int4-g32-asym),
             ternary, fp8, nf4, nf4-double, nvfp4, mxfp4, mxfp8
    METHOD   gptq, awq (integers, calibrated on training text), hqq (integers, without data);
             without one to nearest
    dynamic  activations too, with scales of their own for each token: int8 in integers, the others
             in the format of the weights

Embeddings and the output head stay as they are.
"""

import re
from dataclasses import dataclass
from typing import Literal

from kernels.storage import Storage

AS_TRAINED = "as-trained"
Method = Literal["nearest", "gptq", "awq", "hqq"]
_NAME = re.compile(
    r"(?:(gptq|awq|hqq)-)?"
    r"(?:int([2-8])(?:-g(\d+))?(-asym)?|(ternary|fp8|nf4|nf4-double|nvfp4|mxfp4|mxfp8))"
    r"(-dynamic)?"
)
_FORMS = (
    "[gptq-|awq-|hqq-]int2 to int8[-gN][-asym], ternary, fp8, nf4, nf4-double, nvfp4, mxfp4, "
    "mxfp8, and with activations int8-dynamic, fp8-dynamic, nvfp4-dynamic, mxfp4-dynamic, "
    "mxfp8-dynamic; as-trained for a model of model/rounding"
)
_REFUSED = {
    "qoq": "its product of 4-bit weights and 8-bit activations needs kernels of its own on a GPU; "
    "take int4-g32 or int8-dynamic",
    "eagle": "it is a draft model that is trained on the features of another, no format of "
    "weights; a smaller run of the same sweep speculates without training: see generate --draft",
    "bnb": "nf4 is bitsandbytes' format to the bit, nf4-double its nested scales; take one of them",
    "bitsandbytes": "nf4 is its format to the bit, nf4-double its nested scales; take one of them",
    "gguf": "llama.cpp's formats are made by export --to gguf --dtype q8_0",
}
_DYNAMIC = ("int8", "fp8", "nvfp4", "mxfp4", "mxfp8")
_BITS = {"ternary": 2, "fp8": 8, "mxfp8": 8}  # of an element; all others have 4


@dataclass(frozen=True)
class Scheme:
    """See the file.

    Args:
        dynamic: quantise activations too.
    """

    name: str
    method: Method
    storage: Storage
    dynamic: bool

    @property
    def needs_data(self) -> bool:
        """Whether it is calibrated on text."""
        return self.method in ("gptq", "awq")

    @property
    def is_emulated(self) -> bool:
        """Whether no kernel multiplies in the format: weights are unpacked for a product in fp."""
        return self.storage.elements != "int8"


def parse_scheme(name: str) -> Scheme:
    """Return the scheme of a name.

    Raises:
        ValueError: it is none; the message lists the forms, and why a known one is not here.
    """
    for refused, why in _REFUSED.items():
        if name.lower().startswith(refused):
            raise ValueError(f"scheme={name}: there is no {refused}: {why}")
    if name == AS_TRAINED:
        return Scheme(name, "nearest", Storage("trained", 0), dynamic=False)
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"scheme={name!r} is none of: {_FORMS}")
    method, bits, group, asym, other, dynamic = match.groups()
    if method and other:
        raise ValueError(f"scheme={name}: {method} rounds integers; take {method}-int4-g32")
    if dynamic and name not in {f"{one}-dynamic" for one in _DYNAMIC}:
        raise ValueError(f"scheme={name}: activations are quantised by {', '.join(_DYNAMIC)}")
    if group is not None and int(group) < 2:
        raise ValueError(f"scheme={name}: a group of {group} columns must be of at least 2")
    if other:
        elements = {"nf4": "nf4_single", "nf4-double": "nf4"}.get(other, other)
        storage = Storage(elements, _BITS.get(other, 4))  # type: ignore[arg-type]
    elif bits == "8" and not (method or group or asym):
        storage = Storage("int8", 8)
    else:
        symmetric = asym is None and method != "hqq"
        storage = Storage("int", int(bits), int(group) if group else None, symmetric)
    return Scheme(name, method or "nearest", storage, bool(dynamic))  # type: ignore[arg-type]
