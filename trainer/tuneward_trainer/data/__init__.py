"""From files as people have them to token ids and loss weights on disk.

files.py      bytes -> lines of JSON, whatever the editor or shell did to them
tables.py     the same for rows of Parquet, and Zstandard
formats.py    a line -> a sample (messages, prompt and completion, or text), or errors with the path of the field
messages.py   one message of a sample
render.py     a sample -> texts with trained spans, through the model's own chat template
encode.py     texts -> ids and one loss weight a token
samples.py    all of this for a batch of lines
documents.py  the cache on disk that training reads
problems.py   what is wrong, where, and what is allowed
build.py      all of it over all files of a job, with every error of every file
"""
