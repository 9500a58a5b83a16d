"""Arguments of a transformers or TRL trainer that trains as a plain loop would: SGD at a constant rate."""

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
