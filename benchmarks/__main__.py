"""``python -m benchmarks``: every benchmark, one after another."""

from benchmarks import plan

if __name__ == "__main__":
    plan.main()
