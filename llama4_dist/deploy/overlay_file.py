"""Reads `deploy.yaml` of an overlay: what no plan knows, such as paths on the cluster and cores of a pod."""

from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llama4_dist.errors import ConfigError
from llama4_dist.settings_file import read_yaml


class OverlaySettings(BaseModel):
    """Sizes are bytes, times seconds. Cores are those of a pod per device it holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_dir: PurePosixPath = Field(description="checkpoint folder as every pod sees it")
    model_name: str = Field(min_length=1, max_length=128, description="name clients use")
    attention_cores: int = Field(default=8, ge=1, le=256)
    expert_cores: int = Field(default=4, ge=1, le=256)
    start_timeout_s: int = Field(default=3600, ge=30, le=86400, description="for all workers to start and load")
    placement_timeout_s: int = Field(default=1800, ge=30, le=86400, description="for pods to come")
    drain_timeout_s: int = Field(default=600, ge=1, le=3600, description="the longest stream a gateway waits for")

    @field_validator("model_dir")
    @classmethod
    def _check_absolute(cls, given: PurePosixPath) -> PurePosixPath:
        if not given.is_absolute() or ".." in given.parts:
            raise ValueError("must be an absolute path without ..")
        return given


def read_overlay(file: Path) -> OverlaySettings:
    """Read the file; raise ConfigError naming it and every wrong field."""
    try:
        return OverlaySettings(**read_yaml(file))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"{file}: {wrong}") from None
