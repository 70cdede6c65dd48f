"""Models on the Hugging Face Hub, by huggingface_hub's own mixin: the files are those of a run's model/ folder.

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

SECONDS_FOR_ANSWER = 5


class HubModel(ModelHubMixin):
    """A model that can be pushed to the Hub and loaded from it: `from_pretrained`, `save_pretrained`, `push_to_hub`."""

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
    """The model called user/name, from the cache where there is no network; UserError where it cannot be had."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    reachable = True
    try:  # else it would be asked for five times, with a line on the terminal each
        urllib.request.urlopen(constants.ENDPOINT, timeout=SECONDS_FOR_ANSWER).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except ValueError as error:
        raise ConfigError(f"HF_ENDPOINT={constants.ENDPOINT}: no address; it begins with https://.") from error
    except OSError:
        reachable = False
    try:
        model = HubModel.from_pretrained(name, local_files_only=not reachable)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        why = "it has no such model" if reachable else "it cannot be reached, and nothing of it is in the cache"
        raise UserError(
            f"--model {name}: no folder of that name is here, and the Hugging Face Hub ({constants.ENDPOINT}): {why}"
            f" ({type(error).__name__})."
        ) from error
    return model.net, model.model_config
