"""`hf:NAME` goes in (the hub's name, or a local folder with config.json); transformers' vision network comes out.

Weights are safetensors only, and no code of the hub is ever run. `--random-init` takes the configuration of a few
well-known networks from `_hf_known`, so that it needs no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rdeploy.build_request import LoadOptions
from rdeploy.errors import ConfigError, MissingDependency, Unsupported
from rdeploy.metrics.detection import BOXES, SIGMOID, SOFTMAX
from rdeploy.models import _hf_known, download
from rdeploy.models._hf_processor import facts_of
from rdeploy.models.network import Network, one_line

TOWERS = {
    "CLIPModel": "CLIPVisionModelWithProjection",
    "SiglipModel": "SiglipVisionModel",
    "Siglip2Model": "Siglip2VisionModel",
    "ViTMAEForPreTraining": "ViTMAEModel",
}
"""Networks of two towers, or of an encoder and what it was trained with: the part that a deployment runs."""

TASKS = {
    "ForImageClassification": "classification",
    "ForImageClassificationWithTeacher": "classification",
    "ForSemanticSegmentation": "segmentation",
    "ForObjectDetection": "detection",
}


class Vision(nn.Module):  # type: ignore[misc]
    """A transformers network called with images alone, at any size that its position embedding can be resampled to."""

    def __init__(self, model: nn.Module, *, interpolates: bool, flips: bool) -> None:
        super().__init__()
        self.model, self.interpolates, self.flips = model, interpolates, flips

    def forward(self, images: torch.Tensor) -> Any:
        """Map images (N, C, H, W), RGB, to transformers' output."""
        images = images.flip(1) if self.flips else images
        more = {"interpolate_pos_encoding": True} if self.interpolates else {}
        answer = self.model(pixel_values=images, **more)
        return _queries(answer, self.model.config.num_labels) if BOXES in answer else answer

    def extra_repr(self) -> str:
        """Return what the fingerprint of the module has to tell apart."""
        return f"interpolates={self.interpolates}, flips={self.flips}"


def _queries(answer: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """Name a detector's logits after what makes them scores: with one more than there are classes the last is "none"."""
    logits = answer["logits"]
    return {SOFTMAX if logits.shape[-1] == classes + 1 else SIGMOID: logits, BOXES: answer[BOXES]}


def build(name: str, options: LoadOptions, *, pretrained: bool) -> Network:
    """Create the network `name` with its weights, or with random ones.

    Raises:
        MissingDependency: transformers is not installed.
        ConfigError: there is no such network, its configuration or weights are out of reach, or not safetensors.
        Unsupported: it is no vision network, or it needs code of the hub.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency("transformers is not installed", install="pip install 'rdeploy[hf]'") from error

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    described, processor = _described(transformers, name, options, pretrained=pretrained)
    architecture = str((described.get("architectures") or [""])[0])
    factory = _factory(transformers, TOWERS.get(architecture, architecture), name)
    try:
        with _guarded(name, options, pretrained=pretrained):
            if pretrained:
                model = factory.from_pretrained(name, use_safetensors=True, local_files_only=Path(name).is_dir())
            else:
                model = factory(_config(factory, described, options))
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise ConfigError(f"transformers cannot build {name}: {one_line(error)}") from error
    flips = bool(processor.get("do_flip_channel_order"))
    module = Vision(model, interpolates=_interpolates(factory), flips=flips)
    task = next((task for ending, task in TASKS.items() if architecture.endswith(ending)), "embedding")
    facts = facts_of(model.config.to_dict(), processor, task=task)
    return Network(module=module, name=Path(name).name, facts=facts)


def _described(
    transformers: Any, name: str, options: LoadOptions, *, pretrained: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what config.json and preprocessor_config.json say."""
    if not pretrained and not Path(name).is_dir() and name in _hf_known.KNOWN:
        return _hf_known.described(name)
    config = _fetched(name, options, "config.json", pretrained=pretrained, required=True)
    if config is None:
        raise ConfigError(f"{name} holds no config.json: name a network of the hub, or a folder that was saved by one")
    if (
        config.get("auto_map")
        and config.get("model_type") not in transformers.models.auto.configuration_auto.CONFIG_MAPPING
    ):
        raise Unsupported(f"hf:{name} needs code of the hub ({config['model_type']}), which rdeploy never runs")
    return config, _fetched(name, options, "preprocessor_config.json", pretrained=pretrained) or {}


def _fetched(
    name: str, options: LoadOptions, file: str, *, pretrained: bool, required: bool = False
) -> dict[str, Any] | None:
    """Return one JSON file of a folder or of the hub; None where there is none and it is not `required` of the hub."""
    import json

    from transformers.utils import cached_file

    path = str(Path(name) / file) if (Path(name) / file).is_file() else None
    if not Path(name).is_dir():
        with _guarded(name, options, pretrained=pretrained):
            path = cached_file(name, file, _raise_exceptions_for_missing_entries=required)
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {one_line(error)}") from error
    return content if isinstance(content, dict) else None


def _guarded(name: str, options: LoadOptions, *, pretrained: bool) -> Any:
    if Path(name).is_dir():
        return _Local(name)
    known = "" if pretrained else f"; known without the hub: {', '.join(sorted(_hf_known.KNOWN))}"
    what = "pretrained weights" if pretrained else "settings"
    ways = download.advice("hf", name) if pretrained else f"use hf:FOLDER with its config.json{known}"
    return download.guarded("hf", name, url=None, offline=options.offline, what=what, ways_out=ways)


class _Local:
    """Read a local folder; what is missing in it is said in one sentence."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise ConfigError(
                f"{self._name} holds no model.safetensors (other weights are pickles and are not opened): save it with "
                "save_pretrained(folder, safe_serialization=True), or add --random-init"
            ) from error


def _factory(transformers: Any, architecture: str, name: str) -> Any:
    factory = getattr(transformers, architecture, None) if architecture else None
    if factory is None or not isinstance(factory, type) or not issubclass(factory, transformers.PreTrainedModel):
        raise Unsupported(
            f"hf:{name} is a {architecture or 'network of no known kind'}, which transformers cannot build"
        )
    if getattr(factory, "main_input_name", "") != "pixel_values":
        raise Unsupported(f"hf:{name} is a {architecture}, which takes no images: rdeploy deploys vision networks")
    return factory


def _config(factory: Any, described: Mapping[str, Any], options: LoadOptions) -> Any:
    """Return the configuration of a network with random weights; of two towers the vision tower's part."""
    given = dict(described.get("vision_config") or described)
    if "vision_config" in described and "projection_dim" in described:
        given["projection_dim"] = described["projection_dim"]
    drop = ("architectures", "model_type", "transformers_version", "torch_dtype", "dtype")
    kept = {key: value for key, value in given.items() if key not in drop}
    return factory.config_class(**{**kept, **dict(options.arch_kwargs)})


def _interpolates(factory: Any) -> bool:
    import inspect

    return "interpolate_pos_encoding" in inspect.signature(factory.forward).parameters
