"""KV outside the cache: tiers in host memory and on disk, and other instances. Torch-free.

One rule: content is moved, not addresses. A block's KV is asked for by its name (`BlockName`), the hash of
all tokens up to its end under the request's salt and adapter, and only among KV of one fingerprint (model,
precision, layout, numerics). A reference that is old or forged gives a miss, never wrong KV.
"""
