"""Models on the Hugging Face Hub, with huggingface_hub's mixin and the files of a run's model/ folder.

net, config = load_from_hub("somebody/mnist-cnn")
HubModel(net, config).push_to_hub("somebody/mnist-cnn")
"""

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download
from torch import nn

from mnist.errors import ConfigError, UserError
from mnist.models.saved import ModelConfig, load_model, save_model

CONNECT_SECONDS = 5


class HubModel(ModelHubMixin):
    """A model with `from_pretrained`, `save_pretrained` and `push_to_hub`."""

    def __init__(self, net: nn.Module, model_config: ModelConfig) -> None:
        self.net = net
        self.model_config = model_config

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self.net, Path(save_directory), self.model_config)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "HubModel":
        folder = Path(model_id)
        if not folder.is_dir():
            known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            chosen = {name: options[name] for name in known if name in options}
            files = ["config.json", "model.safetensors"]
            folder = Path(snapshot_download(model_id, allow_patterns=files, **chosen))
        return cls(*load_model(folder))


def load_from_hub(name: str) -> tuple[nn.Module, ModelConfig]:
    """The model called user/name, from the cache if there is no network. Raises UserError if it is not available."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    reachable = True
    try:  # without this check, huggingface_hub would retry five times and print a line each time
        urllib.request.urlopen(constants.ENDPOINT, timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # the server has answered
    except ValueError as error:
        raise ConfigError(f"HF_ENDPOINT={constants.ENDPOINT}: not a URL. It must begin with https://.") from error
    except OSError:
        reachable = False
    try:
        model = HubModel.from_pretrained(name, local_files_only=not reachable)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        why = "has no such model" if reachable else "cannot be reached, and the model is not in the cache"
        raise UserError(
            f"--model {name}: no such folder, and {constants.ENDPOINT} {why} ({type(error).__name__})."
        ) from error
    return model.net, model.model_config
