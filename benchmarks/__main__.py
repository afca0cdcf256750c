"""``python -m benchmarks``: every benchmark, one after another."""

from benchmarks import loss_memory, plan

if __name__ == "__main__":
    plan.main()
    loss_memory.main()
