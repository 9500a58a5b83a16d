"""The ablation runner's day: a grid of one's own is trained, gone on with, priced, reported and committed.

docs/ablations.md and docs/reports.md have the commands.
"""

from pathlib import Path

from typed import SMALL, shell

shell("consistency-reg ablate recipes/ablations/demo.yaml --dry-run")

Path("mine.yaml").write_text(shell(f"consistency-reg fit --config quickstart {SMALL} --print_config"))
Path("grid.yaml").write_text(
    "recipe: mine.yaml\nruns: runs/mine\nseeds: [0, 1]\ncells:\n"
    '  - {name: "off", overrides: {consistency.weight: 0.0, routing.deployed_strength: 0.1}}\n'
    "  - {name: srp, overrides: {consistency.weight: 0.35}}\n"
    "  - {name: remoe, overrides: {consistency.loss: {class_path: consistency_reg.losses.ReMoELoss}, "
    "consistency.weight: 0.02}}\n"
)
shell("consistency-reg ablate grid.yaml --only cell=off")
shell("consistency-reg ablate grid.yaml --jobs 2")  # goes on with the others
shell("consistency-reg ablate grid.yaml")  # nothing is left to do
shell("consistency-reg report runs/mine")
shell("consistency-reg price runs/mine --cache-aware 0,0.1,0.2")
shell("consistency-reg report runs/mine --append-csv results/mine.csv --pictures pictures")
Path("RESULTS.md").write_text(
    "# Mine\n\n<!-- report results/mine.csv: Overview -->\n<!-- end of report -->\n\n"
    "<!-- report results/mine.csv: As deployed: misses within a budget -->\n<!-- end of report -->\n"
)
shell("consistency-reg report results/mine.csv --out again --update RESULTS.md")
