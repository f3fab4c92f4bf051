"""What all parameters share: frozen typed models, and which of their fields make a stage what it is."""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

Run = Field(json_schema_extra={"identity": False})
# A field that came later: what leaves it at its default is still the stage that it was before the field existed.
Late = Field(json_schema_extra={"identity": "unless default"})


class Params(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """What the stage IS: all fields but those marked Run and Late ones at their default; nested models too."""
        out = {}
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            rule = extra.get("identity") if isinstance(extra, dict) else None
            if rule is False or (rule == "unless default" and getattr(self, name) == info.get_default()):
                continue
            out[name] = _identity(getattr(self, name), lambda name=name: self.model_dump(mode="json")[name])
        return out


def _identity(value: Any, dumped: Callable[[], Any]) -> Any:
    if isinstance(value, Params):
        return value.identity()
    if isinstance(value, dict) and any(isinstance(inner, Params) for inner in value.values()):
        return {key: inner.identity() for key, inner in value.items()}
    return dumped()
