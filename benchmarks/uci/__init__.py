"""The default recipe for tables on the UCI regression sets with their standard splits.

    python -m benchmarks.uci --data DIR [--sets concrete,energy] [--splits 0-4] [--json OUT]
        [--jobs N] [--output PAGES]

Each `DIR/<set>/data.npz` holds x [N, F], y [N] or [N, D], and the row numbers of the splits,
`train_00`, `test_00`, `train_01`, .. Every split is fitted by `experiment=tabular` as a run would
fit it, and scored on its test rows in the units of y. A process for each core
takes up to five splits of a set at a time, and compiles its programs once for each set.
What is done already stands in OUT and is not done again. Overrides of the config may follow.

Shape letters: D event size, N rows.
"""
