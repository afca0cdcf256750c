"""``python -m benchmarks``: one benchmark after another; all but ``index``, which asks for a tokenizer."""

from benchmarks import checkpoint, draw, loader, loss_memory, memory, merge, model_step, overhead, padded_trainer, plan

if __name__ == "__main__":
    plan.main()
    checkpoint.main([])
    draw.main()
    loader.main([])
    loss_memory.main()
    memory.main([])
    model_step.main([])
    padded_trainer.main([])
    overhead.main([])
    merge.main(["--gb", "1"])
