"""From files as people have them to token ids and loss weights on disk.

files.py      bytes -> lines of JSON, whatever the editor or shell did to them
formats.py    a line -> a sample (messages, prompt and completion, or text), or errors with the path of the field
render.py     a sample -> texts with trained spans, through the model's own chat template
encode.py     texts -> ids and one loss weight a token
documents.py  the cache on disk that training reads
problems.py   what is wrong, where, and what is allowed
build.py      all of it over all files of a job, with every error of every file
"""
