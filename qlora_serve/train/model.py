"""The model that is trained: a frozen base with LoRA layers, or the base itself."""

import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qlora_serve.base.gptq import before_peft
from qlora_serve.base.identity import weight_files
from qlora_serve.base.load import LoadedBase
from qlora_serve.base.untrained import untrained_template_tokens, vocabulary_weights
from qlora_serve.errors import BaseModelError, ConfigError
from qlora_serve.train.config import ALL_LINEAR, TrainSettings
from qlora_serve.train.precision import train_in_float32
from qlora_serve.train.save import keep_start

TRAINABLE_QUANTIZATIONS = ("none", "nf4", "int8", "gptq")
_LISTED = 12
_CHECKPOINTING = {"use_reentrant": False}

# How PEFT calls our ways to start an adapter. LoftQ begins as usual and is filled in afterwards:
# PEFT's own setting would put rounded weights into the base.
_STARTS: dict[str, bool | str] = {"default": True, "loftq": True}

Batches = Callable[[], Iterable[dict[str, torch.Tensor]]]


def build_model(base: LoadedBase, settings: TrainSettings, base_name: str, batches: Batches) -> Any:
    """The model to train, made of a base. The random generator must have been seeded.

    Args:
        base: the loaded base; it is changed in place.
        settings: of the run.
        base_name: what adapter_config.json calls the base.
        batches: gives batches of the data, for starts that look at it.

    Raises:
        BaseModelError: bases quantized like this one cannot be trained on.
        ConfigError: a setting does not fit the base.
    """
    _let_padding_learn(base.model)
    if settings.method == "full":
        return _whole_model(base, settings)
    model = add_lora(base, settings, base_name)
    if settings.init == "eva":
        _start_from_data(model, batches)
    elif settings.init == "loftq":
        _start_from_rounding(model, base)
    elif settings.init in ("pissa", "olora"):
        _keep_start(model)
    train_in_float32(model, getattr(torch, base.dtype))
    return model


def _let_padding_learn(model: Any) -> None:
    """Lets the row of the padding token have gradients.

    torch keeps that row of an embedding from ever learning. Where the padding token is also the
    end token, that is the row of the end of every turn; and what is only padding is never attended
    to, so that its gradient is zero anyway.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None


def _whole_model(base: LoadedBase, settings: TrainSettings) -> Any:
    if base.quantization != "none":
        raise BaseModelError(
            f"{base.source.name} is quantized ({base.quantization}), and method full changes all "
            "weights; name the unquantized base, or use --method lora"
        )
    model = base.model
    if settings.gradient_checkpointing:
        with _names_of_transformers_5():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=_CHECKPOINTING)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def add_lora(base: LoadedBase, settings: TrainSettings, base_name: str) -> Any:
    """Puts fresh LoRA layers on a base, of which only they are trained.

    Raises:
        BaseModelError: bases quantized like this one cannot be trained on.
        ConfigError: a setting does not fit the base.
    """
    from peft import get_peft_model

    if base.quantization not in TRAINABLE_QUANTIZATIONS:
        raise BaseModelError(
            f"{base.source.name} is quantized with {base.quantization}, which cannot be trained "
            f"on; expected one of: {', '.join(TRAINABLE_QUANTIZATIONS)}"
        )
    if base.quantization != "none" and settings.init in ("pissa", "olora"):
        raise ConfigError(
            f"init: {settings.init} changes the base's weights, and those of {base.source.name} "
            f"are quantized ({base.quantization}); name the unquantized base"
        )
    _check_modules(base.model, settings)
    _prepare(base, settings.gradient_checkpointing)
    before_peft()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied embeddings: `merge` deals with them
            model: Any = get_peft_model(base.model, _lora_config(base, settings))
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        targets = _shown(settings.target_modules)
        raise ConfigError(f"target_modules {targets} cannot be used: {reason}") from None
    config = model.peft_config["default"]
    # PEFT writes the path of the loaded files, which says little about a hub model, and its set of
    # targets in an order that differs from process to process.
    config.base_model_name_or_path = base_name
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    return model


def _lora_config(base: LoadedBase, settings: TrainSettings) -> Any:
    from peft import EvaConfig, LoraConfig

    targets = settings.target_modules
    extra: dict[str, Any] = {}
    if settings.init == "eva":
        # All modules keep the rank that was asked for.
        extra["eva_config"] = EvaConfig(rho=1.0)
    if settings.layers_to_transform:
        if targets == ALL_LINEAR:
            targets = _all_linear(base.model)  # PEFT takes layers only with names
        extra["layers_to_transform"] = list(settings.layers_to_transform)
    trained = _trained_tokens(base, settings)
    if trained:
        extra["trainable_token_indices"] = trained
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        bias=settings.bias,
        init_lora_weights=_STARTS.get(settings.init, settings.init),
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        modules_to_save=list(settings.modules_to_save) or None,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        task_type="CAUSAL_LM",
        **extra,
    )


def _trained_tokens(base: LoadedBase, settings: TrainSettings) -> Any:
    """PEFT's `trainable_token_indices`.

    Of an output head with weights of its own the rows are trained too: a token whose row there
    stays as it was is read, but never said.
    """
    tokens = settings.trainable_tokens
    if not saves_vocabulary(base.model, settings):
        tokens += settings.add_tokens
    if not tokens:
        return None
    ids = _token_ids(base.tokenizer, tokens)
    inside, outside = base.model.get_input_embeddings(), base.model.get_output_embeddings()
    if outside is None or outside.weight is inside.weight:
        return ids
    return dict.fromkeys(sorted(_vocabulary_names(base.model)), ids)


def saves_vocabulary(model: Any, settings: TrainSettings) -> bool:
    """Whether embedding and output head are trained whole.

    Raises:
        ConfigError: with new tokens, only one of them is.
    """
    names = _vocabulary_names(model)
    chosen = names & set(settings.modules_to_save)
    if settings.add_tokens and chosen and chosen != names:
        raise ConfigError(
            f"modules_to_save: with add_tokens, name all of {', '.join(sorted(names))}, or none of "
            "them to train the new rows only"
        )
    return bool(chosen)


def _token_ids(tokenizer: Any, tokens: Iterable[str]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in tokens if token not in vocabulary]
    if unknown:
        raise ConfigError(
            f"trainable_tokens: {', '.join(map(repr, unknown))} are no tokens of this base; name "
            "single tokens, such as '<|im_start|>'"
        )
    return sorted({int(vocabulary[token]) for token in tokens})


def _prepare(base: LoadedBase, gradient_checkpointing: bool) -> None:
    if base.quantization == "none":
        if gradient_checkpointing:
            with _names_of_transformers_5():
                base.model.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs=_CHECKPOINTING
                )
        return
    from peft import prepare_model_for_kbit_training

    with _names_of_transformers_5():
        prepare_model_for_kbit_training(
            base.model,
            use_gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs=_CHECKPOINTING,
        )


@contextmanager
def _names_of_transformers_5() -> Iterator[None]:
    """Later versions of it warn that `gradient_checkpointing_enable` is about to be renamed, which
    is nothing that a user could mend; PEFT still calls it, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _start_from_data(model: Any, batches: Batches) -> None:
    """EVA: the A matrices span what the layers' inputs vary in (arXiv:2410.07170)."""
    from peft import initialize_lora_eva_weights

    inputs = [
        {name: value for name, value in batch.items() if name != "labels"} for batch in batches()
    ]
    try:
        initialize_lora_eva_weights(
            model,
            dataloader=inputs,
            show_progress_bar=False,
            gather_distributed_inputs=False,  # every process looks at the same batches
        )
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"init: eva cannot start from this data: {reason}") from None


@torch.no_grad()
def _start_from_rounding(model: Any, base: LoadedBase) -> None:
    """LoftQ: the adapter begins as the best update of what NF4 rounded away (arXiv:2310.08659).

    PEFT's own function takes a GPU for it, knows only one file of weights, and leaves the scaling
    of the update out of account.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    prefix = "base_model.model."
    layers = {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    left = set(layers)
    for file in weight_files(base.source):
        with safe_open(file, framework="pt") as stream:
            names = {f"{name}.weight": name for name in left}
            for stored in sorted(names.keys() & set(stream.keys())):
                layer: Any = layers[names[stored]]
                rounded = dequantize_module_weight(layer.get_base_layer()).float()
                lost = stream.get_tensor(stored).to(rounded.device).float() - rounded
                u, sizes, v = torch.linalg.svd(lost, full_matrices=False)
                rank = layer.r["default"]
                roots = sizes[:rank].sqrt()
                layer.lora_A["default"].weight.data = roots[:, None] * v[:rank]
                layer.lora_B["default"].weight.data = u[:, :rank] * roots / layer.scaling["default"]
                left.discard(names[stored])
    if left:
        raise ConfigError(
            f"init: loftq finds no unquantized weights of {sorted(left)[0]} in the base's files; "
            "use another init"
        )


def _keep_start(model: Any) -> None:
    folder = tempfile.TemporaryDirectory(prefix="qlora-serve-start-")
    # It goes away with the model.
    model.qlora_serve_start_folder = folder
    # PEFT names an adapter after the last part of the path.
    keep_start(model, Path(folder.name) / "start")


def count_parameters(model: Any) -> tuple[int, int]:
    """How many parameters are trained, and how many there are; quantized ones count unpacked."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, total = model.get_nb_trainable_parameters()  # knows packed and split ones
        return int(trainable), int(total)
    sizes = [int(getattr(p, "ds_numel", p.numel())) for p in model.parameters()]
    return sum(sizes), sum(sizes)


def untaught_tokens(
    base: LoadedBase, settings: TrainSettings, weights: list[Any] | None = None
) -> list[str]:
    """The chat template's tokens that neither the base knows nor this run will teach it.

    Args:
        base: the loaded base.
        settings: of the run.
        weights: of its vocabulary; by default, those in memory.
    """
    if settings.method == "full" or _vocabulary_names(base.model) & set(settings.modules_to_save):
        return []
    weights = vocabulary_weights(base.model) if weights is None else weights
    found = untrained_template_tokens(base.tokenizer, weights)
    taught = {*settings.trainable_tokens, *settings.add_tokens}
    return [token for token in found if token not in taught]


def _vocabulary_names(model: Any) -> set[str]:
    modules = {model.get_input_embeddings(), model.get_output_embeddings()}
    return {name.rpartition(".")[2] for name, module in model.named_modules() if module in modules}


def vocabulary_flags(model: Any) -> str:
    """The flags with which a run trains the embedding and the output head."""
    return " ".join(f"--modules-to-save {name}" for name in sorted(_vocabulary_names(model)))


def _check_modules(model: Any, settings: TrainSettings) -> None:
    targets = settings.target_modules
    if targets != ALL_LINEAR:
        _check_names(model, targets, "target_modules")
    _check_names(model, settings.modules_to_save, "modules_to_save")
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings, field):
            # PEFT matches a pattern with the end of a path.
            _check_names(model, rf"(.*\.)?({pattern})", field, shown=pattern)
    count: int = model.config.num_hidden_layers
    beyond = [layer for layer in settings.layers_to_transform if not 0 <= layer < count]
    if beyond:
        raise ConfigError(
            f"layers_to_transform: this base has layers 0 to {count - 1}, not {beyond[0]}"
        )


def _check_names(
    model: Any, targets: str | tuple[str, ...], field: str, shown: str | None = None
) -> None:
    paths = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        try:
            wrong = [] if any(re.fullmatch(targets, path) for path in paths) else [targets]
        except re.error as error:
            raise ConfigError(f"{field}: {targets!r} is no regular expression ({error})") from None
    else:
        wrong = [
            name
            for name in targets
            if not any(path == name or path.endswith(f".{name}") for path in paths)
        ]
    if wrong:
        embeddings = [
            path for path, part in model.named_modules() if isinstance(part, torch.nn.Embedding)
        ]
        known = sorted({path.rpartition(".")[2] for path in (*_linear_paths(model), *embeddings)})
        listed = repr(shown) if shown else _shown(tuple(wrong))
        raise ConfigError(
            f"{field} {listed} match nothing in this base; its linear layers and embeddings are: "
            f"{', '.join(known[:_LISTED])}"
        )


def _linear_paths(model: Any) -> list[str]:
    # Quantized layers have classes of their own, all called something with Linear.
    return [name for name, module in model.named_modules() if "Linear" in type(module).__name__]


def _all_linear(model: Any) -> tuple[str, ...]:
    """The names of all linear layers but the output head."""
    head = model.get_output_embeddings()
    paths = [path for path in _linear_paths(model) if model.get_submodule(path) is not head]
    return tuple(sorted({path.rpartition(".")[2] for path in paths}))


def _shown(targets: str | tuple[str, ...]) -> str:
    return repr(targets) if isinstance(targets, str) else ", ".join(map(repr, targets))
