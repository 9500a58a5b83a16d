"""Give the settings of an object as plain values, for the config of a run."""

import inspect
from typing import Any


def plain_settings(instance: Any) -> dict[str, Any]:
    """Return the class of an object and those of its arguments that it keeps, as recipes write them.

    Args:
        instance: an object that keeps the arguments of its constructor under their names.

    Returns:
        ``class_path`` and ``init_args``; values that are not plain (numbers, texts, lists) are given as text.

    Example:
        >>> from consistency_reg.losses import LoadBalanceLoss
        >>> plain_settings(LoadBalanceLoss(running=0.5))["init_args"]
        {'scope': 'global', 'running': 0.5, 'accumulation_steps': 1}
    """
    kind = type(instance)
    names = [name for name in inspect.signature(kind).parameters if hasattr(instance, name)]
    arguments = {name: _plain(getattr(instance, name)) for name in names}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return str(value)
