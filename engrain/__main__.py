"""`python -m engrain`, which launchers such as `accelerate launch -m engrain` need."""

from engrain.cli import main

main()
