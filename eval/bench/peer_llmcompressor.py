"""SparseGPT by llm-compressor on the same model and tokens, for comparison.

It runs in a separate environment:

    python -m venv peer && peer/bin/pip install llmcompressor==0.14.0.1 transformers==5.17.0
    peer/bin/python eval/bench/peer_llmcompressor.py eval/testbed --samples 128 --length 256

Prints JSON: seconds of `oneshot` alone, without loading the model, and the peak resident set size.
"""

import argparse
import json
import resource
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    """Prune once and print the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--structure", default="0:0", help="0:0 for unstructured, or 2:4")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", trust_remote_code=False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (args.samples, args.length), generator=generator)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    modifier = SparseGPTModifier(
        sparsity=args.sparsity, mask_structure=args.structure, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    start = time.perf_counter()
    oneshot(
        model=model, dataset=data, recipe=[modifier], max_seq_length=args.length, num_calibration_samples=args.samples
    )
    seconds = time.perf_counter() - start
    zeros = float((model.model.layers[0].mlp.down_proj.weight == 0).float().mean())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "sparsity": zeros, "peak_bytes": peak, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
