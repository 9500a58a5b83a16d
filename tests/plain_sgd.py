"""Let a transformers or TRL trainer train as a plain loop would: SGD at a constant rate, batches in order."""

from torch.utils.data import SequentialSampler

PLAIN_SGD = {
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "num_train_epochs": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
}


class InOrder:
    """Makes a trainer that it is mixed into take the batches in the order of the data."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)
