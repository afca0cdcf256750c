"""The demo's corpus: real pictures, digit scans, clips and fonts from PyPI packages, composed into small tasks.

1 assets      packages on this machine -> scans, photographs, clips, fonts          assets.py, captions.py
2 studio      one split (train or held-out) of the assets with one random stream    studio.py
3 canvas      backgrounds, shapes, digits, words -> picture -> JPEG or PNG bytes     canvas.py, film.py
4 tasks       a picture and a question whose answer is known by construction        tasks_*.py, pairs.py
5 shards      500 samples each,   every shard from a random stream of its own       build.py
6 tokenizer   byte-level BPE on the texts of the shards                             tokenizer.py

The samples are no natural corpus; they are the smallest real proof of the whole chain.
"""
