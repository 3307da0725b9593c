"""Counts what torch is asked to do: on a card each operation is a kernel to launch."""

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Operations inside, those of a backward too, without views, which launch nothing; and all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.with_views = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.with_views += 1
        self.count += not (func.is_view or func._schema.name in ("aten::detach", "aten::_unsafe_view"))
        return func(*args, **(kwargs or {}))
