"""Hook into modules for one object, without the hook being copied or saved with the model."""

from typing import Any

from torch import nn


class OwnedHook:
    """Calls ``owner.method(*leading, module, ...)`` as a module's hook; copies and pickles of it do nothing.

    So a model can be copied, pickled and saved while something listens to it, and the copy is free of it.

    Example:
        >>> import copy
        >>> heard = []
        >>> class Listener:
        ...     def hear(self, name, module, inputs, output):
        ...         heard.append(name)
        >>> layer = nn.Identity()
        >>> handle = layer.register_forward_hook(OwnedHook(Listener(), "hear", "first"))
        >>> _, _ = layer(0), copy.deepcopy(layer)(0)
        >>> heard
        ['first']
    """

    def __init__(self, owner: Any, method: str, *leading: Any) -> None:
        self.owner = owner
        self.method = method
        self.leading = leading

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        if self.owner is None:
            return None
        return getattr(self.owner, self.method)(*self.leading, module, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnedHook":
        return OwnedHook(None, self.method, *self.leading)

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnedHook, (None, self.method, *self.leading)
