"""keye_train: a training system for Keye-VL, from raw pictures to an averaged model.

The story is one numbered chain; each arrow is a folder::

    1 shards        WebDataset .tar                                       data_tools/
    2 index         one row a sample: bytes, text tokens, media sizes     keye_train/data/indexing.py
    3 mixture       which source is drawn next                            keye_train/data/mixture.py
    4 window        the next N samples of the draw, as metadata           keye_train/data/window.py
    5 packing       window -> packs under a token and a patch budget      keye_train/data/packing.py
    6 global batch  G packs; those that run at the same time cost alike   keye_train/data/balance.py
    7 assignment    pack -> (step, micro-step, rank)                      keye_train/data/planned.py
    8 reader        byte ranges -> decoded media -> tensors, in workers   keye_train/data/reader.py, loader.py
    9 batch         PackedInputs: input_ids [T], pixel_patches [P,3,14,14], ...   keye_train/data/collate.py
   10 model         patches -> tower -> projector -> language model       keye_train/model/
   11 step          loss over all labelled tokens of the global batch     keye_train/training/
   12 export        official key names, safetensors                       keye_train/model/{pretrained,weight_files}.py
   13 merge         mean of exports                                       keye_train/merging/
"""
