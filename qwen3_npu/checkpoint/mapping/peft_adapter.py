"""Describe a PEFT adapter by its adapter_config.json and its tensors. No torch, no files.

Every field of the configuration is understood or refused by name. Targets, layers and experts are determined from the
names of the tensors. Format and meaning: peft's LoraConfig, `LoraModel._create_and_replace` and `ParamWrapper`
(https://github.com/huggingface/peft), version 0.21.

A MoE model's experts are either modules of their own names (`mlp.experts.3.gate_proj`), as in published weights, or
parameters of all experts (`target_parameters`), wrapped around each other:

    model.layers.L.mlp.experts[.base_layer].lora_A.weight [E r, in]    rows e r .. (e + 1) r are expert e's A
                                           .lora_B.weight [out, r E]   columns e, e + E, .. are expert e's B
    gate_up_proj: in = H, out = 2F (gate, then up, which share the A); down_proj: in = F, out = H.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from qwen3_npu.args.lora import ALL_TARGETS, LORA_TARGETS, TargetLayers, lora_scale
from qwen3_npu.checkpoint.mapping.lora import MAGNITUDE, PEFT_SCORE, Lora, peft_module, peft_name, peft_shapes
from qwen3_npu.checkpoint.mapping.source import check_tensors, listed
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.schema import Record, shown

_PREFIX = "base_model.model."
_PROJECTIONS = {projection: target for target, names in ALL_TARGETS.items() for projection in names}
_CONVERT = "convert it with peft: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
# Fields that change nothing that is computed from saved tensors, whatever they say.
_WITHOUT_EFFECT = "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
_WITHOUT_EFFECT += "lora_dropout runtime_config megatron_config megatron_core qalora_group_size loftq_config "
_WITHOUT_EFFECT += "eva_config ensure_weight_tying layers_pattern"
# Fields that change what the adapter computes, and the values under which it is plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "corda_config": (None,),
    "lora_ga_config": (None,),
}
_JUDGED = (
    "r lora_alpha use_dora use_rslora init_lora_weights rank_pattern alpha_pattern target_modules exclude_modules "
)
_JUDGED += "layers_to_transform target_parameters modules_to_save"
# Initial values that leave the base as it was.
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
# What peft saves of the base beside an adapter on embedding or output layer.
_CARRIED = {f"{_PREFIX}{module}.base_layer.weight": f"{module}.weight" for module in ("model.embed_tokens", "lm_head")}
_FUSED = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.mlp\.experts\.(?:base_layer\.)?lora_(A|B)\.weight")


@dataclasses.dataclass(frozen=True)
class Part:
    """The place of the A or B of one projection.

    Attributes:
        stored: name of the tensor in the file.
        rank: of this projection.
        factor: B is multiplied by it, so that the whole adapter has one scale.
        row: first row in the stored tensor.
        expert, experts: columns `expert`, `expert + experts`, .. of a B of all experts; 0, 1: all columns.
    """

    stored: str
    rank: int
    factor: float
    row: int = 0
    expert: int = 0
    experts: int = 1


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter whose projections have one rank and one scale, smaller ranks being filled with zeros.

    Attributes:
        parts: PEFT's name of a projection's A or B -> its place; absent ones are zeros.
        projections: those that have an adapter in any layer.
        carried: name of a tensor of the file that is a weight of the base -> its name in the base.
    """

    lora: Lora
    parts: dict[str, Part]
    projections: list[str]
    carried: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Found:
    """A and B of a module of the file. `module` is its name in the base, `stem` its name in the file."""

    module: str
    stem: str
    rank: int
    projections: dict[str, tuple[int, int, int]]  # module -> first row of A, first row of B, expert
    experts: int = 1


def read_adapter(config: Record, shapes: Mapping[str, tuple[int, ...]], arch: Qwen3Arch, where: str) -> Adapter:
    """What an adapter is.

    Args:
        shapes: of the tensors in the file, which `where` names.

    Raises:
        UsageError: a field is not understood or asks for something else than LoRA, or tensors are missing, extra or of
            another shape.
    """
    _check_config(config)
    if has_head(config) != (PEFT_SCORE in shapes):
        raise UsageError(f"{where}: {PEFT_SCORE} and modules_to_save of {config.where} contradict each other")
    if shapes.get(PEFT_SCORE, head := (1, arch.hidden_size)) != head:
        raise UsageError(f"{where}: {PEFT_SCORE} has shape {shapes[PEFT_SCORE]}; {head} expected of a reward model")
    shapes = {name: shape for name, shape in shapes.items() if name != PEFT_SCORE}
    known = peft_shapes(arch, Lora(1, 1.0, tuple(LORA_TARGETS if arch.tie_word_embeddings else ALL_TARGETS)))
    carried = {name: hf for name, hf in _CARRIED.items() if name in shapes}
    shapes = {name: shape for name, shape in shapes.items() if name not in carried}
    is_dora = config.boolean("use_dora", False)
    vectors = {name: shapes[name] for name in shapes if is_dora and name.endswith(MAGNITUDE)}
    shapes = {name: shape for name, shape in shapes.items() if name not in vectors}
    found = _modules(shapes, known, arch, where)
    _check_targets(config, {f.module for f in found}, {peft_module(name) for name in known}, arch, where=where)
    r, alpha = config.integer("r", least=1), config.number("lora_alpha")
    rank_of, alpha_of = _pattern(config, "rank_pattern"), _pattern(config, "alpha_pattern")
    is_stabilized, scales = config.boolean("use_rslora", False), list[float]()
    for item in found:
        rank, own = rank_of(item.module, r), alpha_of(item.module, alpha)
        if item.rank != rank:
            raise UsageError(f"{where}: {item.module} has rank {item.rank}; {config.where} says {shown(rank)}")
        if not own > 0:
            raise UsageError(f"{config.where}: lora_alpha is {shown(own)}; a number above 0 is expected")
        scales.append(lora_scale(own, rank, is_stabilized=is_stabilized))
    top, scale = max(item.rank for item in found), max(scales)
    parts: dict[str, Part] = {}
    for item, own in zip(found, scales, strict=True):
        for stem, (row_a, row_b, expert) in item.projections.items():
            parts[peft_name(stem, "A")] = Part(peft_name(item.stem, "A"), item.rank, 1.0, row_a)
            b = Part(peft_name(item.stem, "B"), item.rank, own / scale, row_b, expert=expert, experts=item.experts)
            parts[peft_name(stem, "B")] = b
    modules = {peft_module(name) for name in parts}
    names = {module.split(".")[-1] for module in modules}
    targets = tuple(target for target in ALL_TARGETS if any(_PROJECTIONS[name] == target for name in names))
    layers = _layers(modules, targets, arch)
    lora = Lora(top, float(alpha), targets, is_stabilized=is_stabilized, layers=layers, is_dora=is_dora)
    if lora.scale != scale:  # of several ranks or alphas
        lora = dataclasses.replace(lora, alpha=scale * top, is_stabilized=False)
    if is_dora:
        _check_magnitudes(vectors, lora, arch, where)
    return Adapter(lora, parts, [name for name in _PROJECTIONS if name in names], carried)


def _check_magnitudes(vectors: Mapping[str, tuple[int, ...]], lora: Lora, arch: Qwen3Arch, where: str) -> None:
    """Check that each projection of an adapted linear has magnitudes, also a projection without A and B."""
    wanted = {name: shape for name, shape in peft_shapes(arch, lora).items() if name.endswith(MAGNITUDE)}
    check_tensors(vectors, wanted, where, "DoRA (q, k and v, or gate and up, have it together)")


def _layers(modules: set[str], targets: tuple[str, ...], arch: Qwen3Arch) -> TargetLayers:
    """Target -> its layers, for targets that only some layers have."""
    found: dict[str, set[int]] = {}
    for module in modules:
        *stem, projection = module.split(".")
        if projection in _PROJECTIONS and stem[:2] == ["model", "layers"]:
            found.setdefault(_PROJECTIONS[projection], set()).add(int(stem[2]))
    some = (t for t in targets if t in found and len(found[t]) < arch.num_hidden_layers)
    return tuple((target, tuple(sorted(found[target]))) for target in some)


def _check_config(config: Record) -> None:
    if config.fields.get("peft_type") != "LORA":
        raise UsageError(f"{config.where}: peft_type LORA expected")
    config.only([*_WITHOUT_EFFECT.split(), *_JUDGED.split(), *_PLAIN])
    for name, plain in _PLAIN.items():
        value = config.fields.get(name)
        if not any(value is one or (type(value) is type(one) and value == one) for one in plain):
            raise UsageError(f"{config.where}: {name} {shown(value)} is not supported; only plain LoRA is")
    start = config.fields.get("init_lora_weights")
    if not any(start is one or (isinstance(start, str) and start == one) for one in _KEEPS_BASE):
        raise UsageError(
            f"{config.where}: init_lora_weights {shown(start)} is not supported, since it changes the base's weights; "
            f"{_CONVERT}"
        )


def has_head(config: Record) -> bool:
    """Whether the adapter makes a reward model. Raises: UsageError: it holds other whole modules."""
    saved = config.fields.get("modules_to_save") or []
    if saved and (not isinstance(saved, list) or "score" not in saved or not set(saved) <= {"score", "classifier"}):
        raise UsageError(
            f"{config.where}: modules_to_save {shown(saved)} is not supported; only the score of a reward model is"
        )
    return bool(saved)


def _modules(
    shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, tuple[int, ...]], arch: Qwen3Arch, where: str
) -> list[_Found]:
    """Every A and B of the file. Raises: UsageError: one is alone, of another shape, or of no known module."""
    fused = {name for name in shapes if arch.is_moe and _FUSED.fullmatch(name)}
    if extra := shapes.keys() - known.keys() - fused:
        raise UsageError(f"{where}: tensors not expected for {arch}: {listed(extra)}")
    if not shapes:
        raise UsageError(f"{where} holds no tensors")
    found = []
    for stem in sorted({name.rsplit(".lora_", 1)[0].removeprefix(_PREFIX) for name in shapes}):
        a, b = (shapes.get(peft_name(stem, matrix)) for matrix in "AB")
        if a is None or b is None:
            raise UsageError(f"{where}: tensors missing: {peft_name(stem, 'A' if a is None else 'B')}")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise UsageError(f"{where}: A and B of {stem} have shapes {a} and {b}; [r, in] and [out, r] expected")
        if peft_name(stem, "A") in fused:
            found.append(_experts(stem, a, b, arch, where=where))
            continue
        inner, outer = known[peft_name(stem, "A")][1], known[peft_name(stem, "B")][0]
        if (a[1], b[0]) != (inner, outer):
            raise UsageError(f"{where}: A and B of {stem} have shapes {a} and {b}; {arch} has [{outer}, {inner}]")
        found.append(_Found(stem, stem, a[0], {stem: (0, 0, 0)}))
    return found


def _experts(stem: str, a: tuple[int, ...], b: tuple[int, ...], arch: Qwen3Arch, *, where: str) -> _Found:
    """One parameter of all experts; its shape says which."""
    hidden, width, experts = arch.hidden_size, arch.moe_intermediate_size, arch.num_experts
    names = {(hidden, 2 * width): ("gate_up_proj", "gate_proj", "up_proj"), (width, hidden): ("down_proj", "down_proj")}
    if (a[1], b[0]) not in names or a[0] % experts:
        raise UsageError(
            f"{where}: A and B of {stem} have shapes {a} and {b}; {experts} experts of gate_up_proj "
            f"[{2 * width}, {hidden}] or down_proj [{hidden}, {width}] expected"
        )
    whole, *halves = names[a[1], b[0]]
    module, rank = stem.removesuffix(".base_layer"), a[0] // experts
    places = {
        f"{module}.{expert}.{name}": (expert * rank, half * width, expert)
        for expert in range(experts)
        for half, name in enumerate(halves)
    }
    return _Found(f"{module}.{whole}", stem, rank, places, experts=experts)


def _check_targets(config: Record, found: set[str], known: set[str], arch: Qwen3Arch, *, where: str) -> None:
    """Check that the file has the modules that the configuration names, and no others."""
    named, parameters = config.fields.get("target_modules"), config.sequence("target_parameters", ())
    wholes = {f"model.layers.{i}.mlp.experts.{name}" for i in range(arch.num_hidden_layers) for name in _WHOLES}
    expected: set[str] = set()
    for kind, names, among in (("target_modules", named, known), ("target_parameters", parameters, wholes)):
        for target in () if isinstance(names, str) or names is None else config.sequence(kind, ()):
            matching = {m for m in among if isinstance(target, str) and (m == target or m.endswith("." + target))}
            if not matching:
                raise UsageError(
                    f"{config.where}: {kind} {shown(target)} not supported; {', '.join(_PROJECTIONS)} of {arch} are"
                )
            expected |= matching
    layers = config.fields.get("layers_to_transform")
    if layers is not None:
        chosen = {layers} if type(layers) is int else set(config.counts("layers_to_transform"))
        expected = {m for m in expected if m.startswith("model.layers.") and int(m.split(".")[2]) in chosen}
    if isinstance(named, str) or config.fields.get("exclude_modules"):
        return  # an expression, which the tensors have answered
    # Experts of one name each may be stored as a parameter of all, and the other way round.
    if missing := expected - found - _as_parts(found, arch):
        raise UsageError(f"{where}: tensors missing for {config.where}: {listed(missing)}")
    if extra := found - expected - _as_parts(expected, arch):
        raise UsageError(f"{where}: tensors not expected for {config.where}: {listed(extra)}")


_WHOLES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def _as_parts(modules: set[str], arch: Qwen3Arch) -> set[str]:
    """Parameters of all experts, as one module per expert."""
    return {
        f"{stem}.{expert}.{part}"
        for stem, _, whole in (module.rpartition(".") for module in modules)
        if stem.endswith(".experts")
        for part in _WHOLES[whole]
        for expert in range(arch.num_experts)
    }


def _pattern(config: Record, field: str) -> Callable[[str, object], Any]:
    """(module, default) -> rank or alpha, by `rank_pattern` or `alpha_pattern`: the first key that matches counts."""
    patterns: dict[re.Pattern[str], float] = {}
    fields = config.record(field, Record({}, config.where))
    for key in fields.fields:
        # An expression that takes exponential time could be in the file: none of groups repeated, few repetitions.
        if len(key) > 200 or re.search(r"\)\s*[*+?{]", key) or len(re.findall(r"[*+?{]", key)) > 4:
            raise UsageError(f"{config.where}: {field} {shown(key)} is not supported; give names of modules")
        try:
            compiled = re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise UsageError(f"{config.where}: {field} {shown(key)} is no expression: {error}") from None
        patterns[compiled] = fields.integer(key, least=1) if field == "rank_pattern" else fields.number(key)

    def find(module: str, default: object) -> Any:
        return next((value for pattern, value in patterns.items() if pattern.match(module)), default)

    return find
