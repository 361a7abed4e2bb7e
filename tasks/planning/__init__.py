"""What a run will cost, before it runs; and what it took.

`plan` is what is kept, and where one begins; `estimate` makes it. A run is sized (`model`,
`corpus`) and put on a machine (`hardware`, `planned`); its stages are costed (`stages`: `fitcosts`,
`scorecosts`) and timed (`seconds`, at the `rates` of `startup` and `probe`). What does not fit is
told with what would (`remedies`); all is shown (`table`) beside what the stages took (`measured`).
"""
