"""From files as people have them to token ids and loss weights on disk.

files.py      bytes -> lines of JSON, whatever the editor or shell did to them
tables.py     the same for rows of Parquet, and Zstandard
formats.py    a line -> a sample (messages, prompt and completion, or text), or errors with the path of the field
messages.py   one message of a sample
calls.py      calls of tools, as engines give them to a template
pairs.py      two answers to one prompt: a sample of two sides
render.py     a sample -> texts with trained spans, through the model's own chat template
shapes.py     the same in one rendering, where the template only copies
encode.py     texts -> ids and one loss weight a token
mistral.py    the same for Mistral's own tokenizers, which have no template (mistral_messages.py: as they take messages)
samples.py    all of this for a batch of lines
crew.py       batches through several processes
documents.py  the cache on disk that training reads
journal.py    how far a pass over all files came, for the next process
gathered.py   what such a pass found
overlap.py    samples that occur twice
show.py       a sample's tokens, with what is learnt of them
corrected.py  files without their bad samples
problems.py   what is wrong, where, and what is allowed
build.py      all of it over all files of a job, with every error of every file
"""
