"""What all parameters share: frozen typed models, and which of their fields make a stage what it is."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

Run = Field(json_schema_extra={"identity": False})


class Params(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """What the stage IS: all fields but those marked Run, nested models included."""
        out = {}
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            if isinstance(extra, dict) and extra.get("identity") is False:
                continue
            value = getattr(self, name)
            out[name] = value.identity() if isinstance(value, Params) else self.model_dump(mode="json")[name]
        return out
