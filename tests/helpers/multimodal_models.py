"""Small multimodal models of the Mistral 3 line, random, as transformers makes and saves them."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from family_models import FAMILY, SIZES, randomize
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

#: How the names of what language models do not have begin.
VISION: Final = ("vision_tower.", "multi_modal_projector.")
#: The case that is no variant of another.
DENSE: Final = "mistral small 3"
#: Sizes that differ from each other wherever they can. An image of 28 x 28 gives 4 x 4 patches, and these 2 x 2 tokens.
_VISION: Final[dict[str, Any]] = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 7,
}
_IMAGE_TOKEN: Final = 7
_PIXELS: Final = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
_TOKENS: Final = torch.tensor([[3, 1, *[_IMAGE_TOKEN] * 4, 4, 1, 5, 9, 2, 6]])


@dataclass(frozen=True, kw_only=True)
class Multimodal:
    """A model to save: its text_config, what else its config.json says, and what a release leaves out of that.

    ``tied`` says how its embeddings are; ``unsaid`` are the levels of config.json that do not say it.
    """

    text: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    unsaid: tuple[str, ...] = ()

    def save(self, folder: Path, **options: object) -> Path:
        """Save as transformers does, with small files of releases beside; give back the folder."""
        self.model().save_pretrained(folder, **options)
        config = json.loads((folder / "config.json").read_text())
        for level in self.unsaid:
            del (config[level] if level else config)["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(config))
        for name in ("preprocessor_config.json", "processor_config.json", "tekken.json", "chat_template.jinja"):
            (folder / name).write_text(f"the content of {name}")
        return folder

    def model(self) -> Mistral3ForConditionalGeneration:
        """The model, every parameter random, norms included."""
        text = deepcopy(SIZES | self.text | {"tie_word_embeddings": self.tied})  # transformers edits what it is given
        more = {"tie_word_embeddings": self.tied, "image_token_index": _IMAGE_TOKEN, **self.config}
        model = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=_VISION, **more))
        randomize(model)
        return model.bfloat16().eval()


#: Case -> the model. Mistral Small 3.1 says nothing of tying, Ministral 3 only in its text_config.
MULTIMODAL: Final = {
    "mistral small 3": Multimodal(
        text={"model_type": "mistral", "sliding_window": None},
        config={"multimodal_projector_bias": True, "spatial_merge_size": 2},
        unsaid=("", "text_config"),
    ),
    "ministral 3": Multimodal(text=FAMILY["ministral3, tied"], tied=True, unsaid=("",)),
    "mistral small 4": Multimodal(text=FAMILY["mistral4"]),
}


def logits(folder: Path) -> torch.Tensor:
    """What the model in ``folder`` says of an image and some text, loaded as transformers does by default."""
    model, found = Mistral3ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    with torch.no_grad():
        said: torch.Tensor = model.eval()(_TOKENS, pixel_values=_PIXELS, image_sizes=torch.tensor([[28, 28]])).logits
    return said
