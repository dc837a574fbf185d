"""`python -m model.engine --fd N`: the engine process. N is its end of a socketpair."""

from model.engine.process import main

if __name__ == "__main__":
    main()
