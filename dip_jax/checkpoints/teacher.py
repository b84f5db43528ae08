"""Opens the user's file of the teacher, DINOv2, which is neither part of the package nor of a checkpoint."""

from etils import epath

from dip_jax.checkpoints.torch_file import read_tensors
from dip_jax.errors import UserError
from dip_jax.models.dinov2 import DinoV2, from_torch
from dip_jax.typing import Params

# Bytes and SHA-256 of the published files.
PUBLISHED = {
    "dinov2_vits14_pretrain.pth": (88_283_115, "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2_vitb14_pretrain.pth": (346_378_731, "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "dinov2_vitl14_pretrain.pth": (1_217_586_395, "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
}


_NAME = "dinov2_vitb14_pretrain.pth"
WHAT_IT_IS = (
    "representation alignment needs the weights of its teacher, DINOv2 ViT-B/14: "
    f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/{_NAME}, {PUBLISHED[_NAME][0]} bytes, SHA-256 {PUBLISHED[_NAME][1]}"
)


def load_teacher(path: epath.PathLike) -> tuple[DinoV2, Params]:
    """The network and its parameters (float32, in host memory); nothing that the file pickles is executed.

    Args:
        path: one of the files of PUBLISHED, or the same tensors in another format that `read_tensors` knows.

    Raises:
        UserError: the file is missing (what it is, and where it is to be had), unreadable, or holds another network.
    """
    if not epath.Path(path).is_file():
        raise UserError(f"{path}: no such file; {WHAT_IT_IS}")
    tensors = read_tensors(path)
    try:
        return from_torch(tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
