"""What each phase of the engine costs, in forward-and-backward passes of the same model.

    python -m benchmarks.engine                     the phases on the fixed model M
    python -m benchmarks.engine --peer kronfluence  the same work by the peer, and their agreement
    python -m benchmarks.engine --scale             sweeps, with fitted exponents

Nothing here is needed to run the system: peers are installed by `pip install -e '.[peers]'`.
"""
