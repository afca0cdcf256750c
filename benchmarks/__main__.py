"""``python -m benchmarks``: every benchmark, one after another."""

from benchmarks import checkpoint, draw, loader, loss_memory, merge, model_step, overhead, padded_trainer, plan

if __name__ == "__main__":
    plan.main()
    checkpoint.main([])
    draw.main()
    loader.main([])
    loss_memory.main()
    model_step.main([])
    padded_trainer.main([])
    overhead.main([])
    merge.main(["--gb", "1"])
