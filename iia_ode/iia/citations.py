"""BibTeX entries of the papers behind a fitted solver."""

from __future__ import annotations

__all__ = ["citation_of"]

_BIBTEX = {
    "iia": """@inproceedings{zhang2024iia,
  author    = {Zhang, Guoqiang and Niwa, Kenta and Kleijn, W. Bastiaan},
  title     = {On Accelerating Diffusion-Based Sampling Process via Improved Integration Approximation},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
}""",
    "heun": """@inproceedings{karras2022edm,
  author    = {Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli},
  title     = {Elucidating the Design Space of Diffusion-Based Generative Models},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022},
}""",
    "ddim": """@inproceedings{song2021ddim,
  author    = {Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
  title     = {Denoising Diffusion Implicit Models},
  booktitle = {International Conference on Learning Representations},
  year      = {2021},
}""",
    "spndm": """@inproceedings{liu2022pndm,
  author    = {Liu, Luping and Ren, Yi and Lin, Zhijie and Zhao, Zhou},
  title     = {Pseudo Numerical Methods for Diffusion Models on Manifolds},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
}""",
    "ipndm": """@inproceedings{zhang2023deis,
  author    = {Zhang, Qinsheng and Chen, Yongxin},
  title     = {Fast Sampling of Diffusion Models with Exponential Integrator},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
}""",
    "dpmpp_2m": """@misc{lu2022dpmsolverpp,
  author        = {Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun},
  title         = {{DPM-Solver++}: Fast Solver for Guided Sampling of Diffusion Probabilistic Models},
  year          = {2022},
  eprint        = {2211.01095},
  archiveprefix = {arXiv},
}""",
}


def citation_of(base: str) -> str:
    """BibTeX entries of IIA and of the named base solver; of IIA alone if the base has no paper of its own."""
    return "\n\n".join([_BIBTEX["iia"], *([_BIBTEX[base]] if base in _BIBTEX else [])])
