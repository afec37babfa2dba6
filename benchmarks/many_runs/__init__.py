"""Many small runs on one GPU: the cells of a comparison, trained in one process.

    python -m benchmarks.many_runs --models preact_resnet20,cmpe_se_preact_resnet20:folded_3x3 --seeds 16 \\
        --minutes 8 --recipe cifar-fast --data folder --data-dir IMAGES --output runs/many

A small network's training step is thousands of kernels of a few microseconds, and launching them one by one leaves a
large GPU idle. Here a whole step is one CUDA graph, and with ``--lanes`` several runs, each on a stream of its own,
share the device. That is up to twice as fast, and stops for good after half a minute or a minute (results/LOG.md, "Runs
side by side"), so it goes with ``--patience``.
Every run is trained on the images, crops and flips that `cmpe-se train` would give it. It starts from the same weights
and leaves the same small files, so `cmpe-se compare` with the same settings takes each one as finished.

``program`` is a network with its training step, ``plans`` the order and crops of the epochs, ``lanes`` who trains what
and when, ``cells`` one run from its first weights to its files, ``table`` what is printed and packed at the end.
"""
