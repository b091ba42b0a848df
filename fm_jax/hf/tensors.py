"""The tensors of a checkpoint folder: one safetensors file, or several and an index.

Read one at a time through the page cache, so that none of it need fit in memory.
Imports no jax.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax import jsonfiles
from fm_jax.errors import UserError, reason
from fm_jax.hf import header
from fm_jax.hf.header import Info

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "consolidated*.pth", "*.pt", "*.pth", "*.ckpt",
           "*.pkl", "pytorch_model.bin.index.json")  # fmt: skip
MOST_LETTERS = 200  # of a file's name, in any alphabet a disk takes
QUANTISED = ("_blocks", "_scales", ".qweight", ".qzeros", ".scales", ".weight_scale",
             ".weight_scale_inv", ".SCB", ".absmax", ".quant_map")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensors:
    """What a folder holds, by name. All headers are checked, no weight is read yet."""

    folder: Path
    infos: dict[str, Info]

    def read(self, name: str) -> np.ndarray:
        """Return a tensor, backed by its file; raises UserError on a dtype not ours."""
        info = self.infos[name]
        check_dtype(info)
        dtype = header.DTYPES[info.kind]
        if not info.num_bytes:
            return np.empty(info.shape, dtype)
        raw = np.memmap(info.file, np.uint8, "r", info.start, (info.num_bytes,))
        return raw.view(np.ndarray).view(dtype).reshape(info.shape)


def open_folder(folder: Path) -> Tensors:
    """Return the tensors of a folder.

    Raises UserError when there are none, when they are pickles, and when an index and
    its files do not say the same.
    """
    single, index = folder / SINGLE, folder / INDEX
    if not folder.is_dir():
        raise UserError(
            "a checkpoint must be a folder with config.json and model.safetensors; got "
            f"{folder}, {'a file' if folder.exists() else 'which does not exist'}."
        )
    if single.exists() and index.exists():
        raise UserError(
            f"a checkpoint must have {SINGLE} or {INDEX}; got both in {folder}. Move "
            "one away."
        )
    if index.exists():
        return Tensors(folder, _indexed(folder, index))
    if single.exists():
        return Tensors(folder, header.read(single))
    raise _nothing(folder)


def check_dtype(info: Info) -> None:
    """Raise UserError unless a tensor is of bfloat16, float16 or float32."""
    if info.kind not in header.DTYPES:
        quantised = info.kind.startswith(("F8_", "F6_", "F4", "U", "I"))
        raise UserError(
            f"tensor {info.name!r} of {info.file} must be bfloat16, float16 or "
            f"float32; got {info.kind}"
            + (
                ", a quantised checkpoint. Fetch one that is not, or dequantise it by "
                "transformers and save_pretrained."
                if quantised
                else ". Convert it first."
            )
        )


def is_quantised(name: str) -> bool:
    """Return whether a tensor is a part of a quantised one, by its name."""
    return name.endswith(QUANTISED)


def listed(names: list[str]) -> str:
    """Return the first names, and how many there are besides."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _indexed(folder: Path, index: Path) -> dict[str, Info]:
    said = _index(index)
    files: dict[str, dict[str, Info]] = {}
    for name, file in said["weight_map"].items():
        if not _is_plain(file):
            raise UserError(
                f"{index} must name files of its folder; got {file!r} for {name!r}."
            )
        files.setdefault(file, {})
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{index} must name files that are there; got none of {listed(missing)}. "
            "Fetch them."
        )
    for file in files:
        files[file] = header.read(folder / file)
    found: dict[str, Info] = {}
    for file, infos in files.items():
        for name, info in infos.items():
            if name in found:
                raise UserError(
                    f"tensor {name!r} must stand in one file; got {found[name].file} "
                    f"and {info.file}. Fetch the folder again."
                )
            if said["weight_map"].get(name) != file:
                raise UserError(
                    f"{index} must name each tensor's file; got "
                    f"{said['weight_map'].get(name, 'none')} for {name!r} of "
                    f"{info.file}. Fetch the folder again."
                )
            found[name] = info
    absent = [name for name in said["weight_map"] if name not in found]
    if absent:
        raise UserError(
            f"{folder / said['weight_map'][absent[0]]} must hold what {INDEX} says; "
            f"got no {listed(absent)}. Fetch the folder again."
        )
    total = said.get("metadata", {}).get("total_size")
    summed = sum(info.num_bytes for info in found.values())
    # Older writers count a tied tensor twice: more is no sign of harm, less is.
    if total is not None and (not isinstance(total, int | float) or total < summed):
        raise UserError(
            f"{index} must have the tensors' bytes as its total_size, {summed}; got "
            f"{total!r}. Fetch the folder again."
        )
    return found


def _index(index: Path) -> dict[str, Any]:
    try:
        said = jsonfiles.parse(jsonfiles.text(index))
    except (OSError, ValueError) as error:
        raise UserError(f"{index} must be JSON; got {reason(error)}.") from error
    weight_map = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} must have a weight_map; got none.")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(
            f"{index} must name a file for each tensor; got something else."
        )
    if not isinstance(said.get("metadata", {}), dict):
        raise UserError(f"{index} must have an object as its metadata; got none.")
    return said


def _is_plain(file: str) -> bool:
    """Return whether a name is that of a file in the same folder, and no more."""
    return (
        file.endswith(".safetensors")
        and len(file) <= MOST_LETTERS
        and not set(file) & {"/", "\\", "\0"}
        and file.isprintable()
    )


def _nothing(folder: Path) -> UserError:
    """Return the error for a folder without safetensors, which says what is there."""
    if pickles := sorted({p.name for glob in PICKLES for p in folder.glob(glob)}):
        return UserError(
            f"a checkpoint must be safetensors; got pickles in {folder}: "
            f"{listed(pickles)}. A pickle runs code when it is read, so fm never "
            'reads one. Convert it where that does no harm: python -c "from '
            "transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained('{folder}').save_pretrained('NEW_DIR')\""
        )
    if (folder / "adapter_config.json").exists():
        return UserError(
            f"a checkpoint must hold whole weights; got an adapter in {folder}. Import "
            "its base first, then the adapter: fm import --base=RUN."
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    got = f"only {listed(others)}" if others else "neither"
    return UserError(
        f"a checkpoint must have {SINGLE} or {INDEX}; got {got} in {folder}."
    )
