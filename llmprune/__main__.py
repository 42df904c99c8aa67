"""`python -m llmprune`, which torchrun can start as well: torchrun --nproc-per-node 2 -m llmprune prune MODEL ..."""

from llmprune.cli import main

main()
