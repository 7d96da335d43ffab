"""The metadata of a GGUF file. It keeps account of the keys that are read, so that any other key can be refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fate_moe.errors import CheckpointError, UnsupportedModelError

__all__ = ["Metadata"]

# Keys of an architecture that change no number here, and why.
_WITHOUT_EFFECT = {
    "attention.layer_norm_epsilon": "every supported family normalises by the root mean square, which has its own key",
    "rope.dimension_sections": "for positions in images; in a text the positions of all sections are equal",
    "rope.scaling.finetuned": "says how the model was trained",
    "tensor_data_layout": "a note of the converter; the order of rows is the architecture's",
}
# Keys that have no effect at these values, and at any other ask for what no supported family does. So do zero, false and an empty
# text, which are llama.cpp's defaults, for all keys but attention.causal.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_group_count": (1,),
    "expert_group_used_count": (1,),
    "expert_weights_norm": (True,),  # families without the setting always normalise
    "expert_weights_scale": (1.0,),
    "logit_scale": (1.0,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
}


class Metadata:
    """The fields of one architecture, without its prefix. Each method marks its key as used.

    A key may have a list with a value for each layer; these must be equal. All methods raise CheckpointError for a value of the
    wrong kind, UnsupportedModelError for values that differ between layers.
    """

    def __init__(self, fields: Mapping[str, Any], architecture: str) -> None:
        prefix = f"{architecture}."
        self.architecture = architecture
        self._fields = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
        self._used: set[str] = set()

    def take(self, key: str) -> Any:
        """The value of ``key``, None if it is absent."""
        self._used.add(key)
        value = self._fields.get(key)
        if not isinstance(value, list):
            return value
        if any(entry != value[0] for entry in value):
            raise UnsupportedModelError(
                f"its metadata's {key} differs between layers ({str(value)[:60]}), which transformers cannot express; "
                "use the model's safetensors"
            )
        return value[0] if value else None

    def peek(self, key: str) -> Any:
        """The value of ``key`` as it stands, None if it is absent; does not mark it."""
        return self._fields.get(key)

    def mark(self, key: str) -> None:
        """``key`` is accounted for, whatever its value."""
        self._used.add(key)

    def count(self, key: str) -> int | None:
        """A positive integer; None if it is absent or zero, which llama.cpp takes for absent."""
        value = self.take(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise self._wrong(key, "a positive integer")
        return value or None

    def number(self, key: str) -> float | None:
        """A finite number; None if it is absent or zero."""
        value = self.take(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)):
            raise self._wrong(key, "a finite number")
        return float(value) if value else None

    def require_count(self, key: str) -> int:
        """As ``count``. Raises CheckpointError when it is absent."""
        if (value := self.count(key)) is None:
            raise self._absent(key)
        return value

    def require_number(self, key: str) -> float:
        """As ``number``. Raises CheckpointError when it is absent."""
        if (value := self.number(key)) is None:
            raise self._absent(key)
        return value

    def flag(self, key: str) -> bool | None:
        """True or False; None if it is absent."""
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def check_all_used(self) -> None:
        """Raises UnsupportedModelError naming the keys that were not used and are not known to have no effect."""
        left = {
            key: value
            for key, value in self._fields.items()
            if key not in self._used and key not in _WITHOUT_EFFECT and not _is_neutral(key, value)
        }
        if left:
            named = ", ".join(f"{self.architecture}.{key} = {repr(value)[:40]}" for key, value in list(left.items())[:3])
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise UnsupportedModelError(
                f"its metadata asks for what transformers' model does not do: {named}{more}; use the model's safetensors"
            )

    def _absent(self, key: str) -> CheckpointError:
        said = "is 0" if key in self._fields else "is missing"
        return CheckpointError(f"its metadata is incomplete: {self.architecture}.{key} {said}; download or convert it again")

    def _wrong(self, key: str, wanted: str) -> CheckpointError:
        value = self._fields[key]
        said = f"{self.architecture}.{key} is {str(value)[:40]!r}, not {wanted}"
        return CheckpointError(f"its metadata is damaged: {said}; download or convert it again")


def _is_neutral(key: str, value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all((not entry and key != "attention.causal") or entry in _NEUTRAL.get(key, ()) for entry in values)
