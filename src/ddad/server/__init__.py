"""The inspection station, `ddad serve`.

`run` starts it. `station` is what happens to a photograph: `decoding` in processes of its own, `batching`, the models
of `hosting`, and `history`; it knows no HTTP. Around it are `guard`, which every request passes, `api` (`/v1`),
`protocol` (`/v2`) and `page` (for people), put together in `app`; `measures` counts. How to run it: docs/serving.md.
"""
