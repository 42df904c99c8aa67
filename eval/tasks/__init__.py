"""Tasks for lm-eval on files that lie here, for evaluations without a network.

The texts are the bundled test model's own, so a score says how much of it is left; on another model they only show
that the way is clear. `python -m llmprune.eval.tasks.write` makes the files anew, from the same seed.

    lm_eval --include_path FOLDER_OF_THIS_FILE --tasks llmprune_offline ...
"""
