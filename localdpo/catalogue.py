"""The models localdpo knows by a short name, with the sizes needed to plan memory before anything is fetched.

It is a table: no network, no files, no mlx. Dimensions are those of each model's config.json.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

STARTER_NAME = "smollm2-135m"
"""The model that comes as a Python package."""


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A known model. ``hub_id`` is None for the starter, which is fetched as a Python package.

    ``disk_bytes`` is the size of the weights. The rest are the dimensions of config.json: ``heads`` query and
    ``kv_heads`` key/value heads of ``head_dim``, ``intermediate`` the width of the MLP.
    """

    name: str
    hub_id: str | None
    disk_bytes: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    license: str
    description: str

    @property
    def layer_parameters(self) -> int:
        """Weights in the matrices of one layer."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Weights in all matrices; norms and biases (under 0.1 %) are left out."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings


_MB = 10**6
_HUB = "mlx-community/"
_APACHE = "apache-2.0"

CATALOGUE: tuple[CatalogueEntry, ...] = (
    CatalogueEntry(
        STARTER_NAME, None, 98 * _MB, 30, 576, 9, 3, 64, 1536, 49152, True, _APACHE,
        "SmolLM2 135M Instruct: the starter; small enough to learn on any CPU",
    ),
    CatalogueEntry(
        "qwen2.5-0.5b", _HUB + "Qwen2.5-0.5B-Instruct-4bit", 278 * _MB, 24, 896, 14, 2, 64, 4864, 151936, True,
        _APACHE, "Qwen2.5 0.5B Instruct: the smallest that holds a conversation, 29 languages",
    ),
    CatalogueEntry(
        "qwen3-0.6b", _HUB + "Qwen3-0.6B-4bit", 335 * _MB, 28, 1024, 16, 8, 128, 3072, 151936, True,
        _APACHE, "Qwen3 0.6B: thinks step by step when asked to",
    ),
    CatalogueEntry(
        "llama3.2-1b", _HUB + "Llama-3.2-1B-Instruct-4bit", 695 * _MB, 16, 2048, 32, 8, 64, 8192, 128256, True,
        "llama3.2", "Llama 3.2 1B Instruct: fluent English in under 1 GB",
    ),
    CatalogueEntry(
        "qwen2.5-1.5b", _HUB + "Qwen2.5-1.5B-Instruct-4bit", 868 * _MB, 28, 1536, 12, 2, 128, 8960, 151936, True,
        _APACHE, "Qwen2.5 1.5B Instruct: a good first model for an 8 GB laptop",
    ),
    CatalogueEntry(
        "qwen3-1.7b", _HUB + "Qwen3-1.7B-4bit", 968 * _MB, 28, 2048, 16, 8, 128, 6144, 151936, True,
        _APACHE, "Qwen3 1.7B: thinks step by step when asked to",
    ),
    CatalogueEntry(
        "gemma2-2b", _HUB + "gemma-2-2b-it-4bit", 1471 * _MB, 26, 2304, 8, 4, 256, 9216, 256000, True,
        "gemma", "Gemma 2 2B Instruct: careful writing",
    ),
    CatalogueEntry(
        "qwen2.5-3b", _HUB + "Qwen2.5-3B-Instruct-4bit", 1736 * _MB, 36, 2048, 16, 2, 128, 11008, 151936, True,
        "qwen-research", "Qwen2.5 3B Instruct: strong for its size; research licence",
    ),
    CatalogueEntry(
        "llama3.2-3b", _HUB + "Llama-3.2-3B-Instruct-4bit", 1807 * _MB, 28, 3072, 24, 8, 128, 8192, 128256, True,
        "llama3.2", "Llama 3.2 3B Instruct: a good all-rounder for 16 GB",
    ),
    CatalogueEntry(
        "qwen3-4b", _HUB + "Qwen3-4B-4bit", 2263 * _MB, 36, 2560, 32, 8, 128, 9728, 151936, True,
        _APACHE, "Qwen3 4B: reasons like much larger older models",
    ),
    CatalogueEntry(
        "mistral-7b", _HUB + "Mistral-7B-Instruct-v0.3-4bit", 4077 * _MB, 32, 4096, 32, 8, 128, 14336, 32768, False,
        _APACHE, "Mistral 7B Instruct v0.3: plain and dependable",
    ),
    CatalogueEntry(
        "qwen2.5-7b", _HUB + "Qwen2.5-7B-Instruct-4bit", 4284 * _MB, 28, 3584, 28, 4, 128, 18944, 152064, False,
        _APACHE, "Qwen2.5 7B Instruct: knowledge and code, for 16 GB and more",
    ),
    CatalogueEntry(
        "llama3.1-8b", _HUB + "Meta-Llama-3.1-8B-Instruct-4bit", 4517 * _MB, 32, 4096, 32, 8, 128, 14336, 128256,
        False, "llama3.1", "Llama 3.1 8B Instruct: the reference 8B model",
    ),
    CatalogueEntry(
        "qwen3-8b", _HUB + "Qwen3-8B-4bit", 4607 * _MB, 36, 4096, 32, 8, 128, 12288, 151936, False,
        _APACHE, "Qwen3 8B: the strongest here; wants 24 GB to train comfortably",
    ),
)  # fmt: skip

UPSTREAM = {
    STARTER_NAME: "HuggingFaceTB/SmolLM2-135M-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "gemma2-2b": "google/gemma-2-2b-it",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
}
"""Hub id of the full-precision original that each model was made from: what PyTorch tools load."""

_BY_NAME = {entry.name: entry for entry in CATALOGUE}
_BY_HUB_ID = {entry.hub_id: entry for entry in CATALOGUE if entry.hub_id}


def find_entry(spec: str) -> CatalogueEntry | None:
    """The entry with this catalogue name or Hub id, if there is one."""
    return _BY_NAME.get(spec) or _BY_HUB_ID.get(spec)


def suggest_names(spec: str) -> list[str]:
    """Catalogue names that look like ``spec``, best first, at most three."""
    return difflib.get_close_matches(spec.lower(), _BY_NAME, n=3, cutoff=0.4)
