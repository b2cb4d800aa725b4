"""LoRA adapters of both networks in one file, loaded and saved as the pipelines of diffusers do it."""

import os
from collections.abc import Mapping
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor

from .repositories import refuse_pickles


class LoraMixin(LoraBaseMixin):
    """What the host offers around LoRA adapters (`set_adapters`, `fuse_lora`, `unload_lora_weights`), for both networks."""

    _lora_loadable_modules = ["denoiser", "context_encoder"]

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        """Load an adapter of one or both networks. Takes what `load_lora_adapter` of a network takes.

        Args:
            pretrained_model_name_or_path_or_dict: A folder, a repository on the Hub, or the weights themselves, under names
                that begin with "denoiser." or "context_encoder.".
            adapter_name: What the adapter is called; default: the host's.
            kwargs: Such as `weight_name`.

        Raises:
            ValueError: If it holds weights for neither network.
        """
        place = pretrained_model_name_or_path_or_dict
        networks = {name: getattr(self, name) for name in self._lora_loadable_modules}
        networks = {name: network for name, network in networks.items() if network is not None}
        before = {name: set(getattr(network, "peft_config", {})) for name, network in networks.items()}
        for name, network in networks.items():
            if isinstance(place, Mapping) and not any(key.startswith(f"{name}.") for key in place):
                continue
            given = dict(place) if isinstance(place, Mapping) else place
            network.load_lora_adapter(given, prefix=name, adapter_name=adapter_name, use_safetensors=True, **kwargs)
        if all(set(getattr(network, "peft_config", {})) == before[name] for name, network in networks.items()):
            what = "The weights" if isinstance(place, Mapping) else str(place)
            raise ValueError(f"{what} must hold a LoRA adapter under denoiser. or context_encoder., and hold none.")

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        denoiser_lora_layers: Mapping[str, Tensor] | None = None,
        context_encoder_lora_layers: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        safe_serialization: bool = True,
        denoiser_lora_adapter_metadata: dict | None = None,
        context_encoder_lora_adapter_metadata: dict | None = None,
    ) -> None:
        """Save an adapter of one or both networks, as of peft's `get_peft_model_state_dict`.

        Args:
            save_directory: The folder.
            denoiser_lora_layers: Weights of the denoiser's adapter.
            context_encoder_lora_layers: Weights of the encoder's.
            is_main_process: Whether this process writes.
            weight_name: Name of the file; default: the host's.
            safe_serialization: Must be true.
            denoiser_lora_adapter_metadata: Its configuration, as of `LoraConfig.to_dict`. Without it an adapter loads with a
                strength (`lora_alpha`) of its rank.
            context_encoder_lora_adapter_metadata: The same of the encoder's.
        """
        refuse_pickles(safe_serialization)
        layers = {"denoiser": denoiser_lora_layers, "context_encoder": context_encoder_lora_layers}
        given = {name: dict(weights) for name, weights in layers.items() if weights}
        if not given:
            raise ValueError(
                "Give denoiser_lora_layers, context_encoder_lora_layers or both: there is nothing to save."
            )
        told = {
            "denoiser": denoiser_lora_adapter_metadata,
            "context_encoder": context_encoder_lora_adapter_metadata,
        }
        cls._save_lora_weights(save_directory, given, told, is_main_process, weight_name, None, True)
