"""Listen to the routers of a module from a Lightning callback."""

from contextlib import ExitStack

from consistency_reg.optional import require
from consistency_reg.session import Listener, ListenOptions, RoutingSession

with require("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class ListeningCallback(Callback):
    """Listens to the routers of a module from :meth:`listen` to :meth:`release`.

    Args:
        options: which routers and tokens of the module it hears.
    """

    def __init__(self, options: ListenOptions) -> None:
        self.options = options
        self._listener: Listener | None = None
        self._recording = ExitStack()

    def listen(self, trainer: Trainer, pl_module: LightningModule) -> Listener:
        """Return what listens to the module, from now on if nothing does yet."""
        if self._listener is None:
            session = RoutingSession.of(pl_module)
            self._listener = session.listen(self.options, optimizers=lambda: trainer.optimizers)
        return self._listener

    def record(self) -> None:
        """Record what runs until the recording is closed; without effect where nothing listens."""
        if self._listener is not None:
            self._recording.enter_context(self._listener.recording())

    def release(self) -> None:
        """Take the hooks off the module; without effect where nothing listens."""
        self._recording.close()
        if self._listener is not None:
            self._listener.release()
            self._listener = None
