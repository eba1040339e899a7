"""What is built can run, train, be exported and come back; all else is one sentence.

420 constructors of six methods, each with one to three arguments drawn from good, odd and impossible values."""
import inspect, math, random
import pytest, torch
from mim_nb.checkpoints import save_encoder
from mim_nb.evaluate import features, load_encoder
from mim_nb.methods import create, methods
from mim_nb.tokenizers import DVAE

NAN = float('nan')
WHOLE = [0, -1, -3, 1.5, NAN, math.inf, True, None, '4', 10**12, [4]]
REAL = [-.1, 1., 1.5, NAN, math.inf, '.5', None, True, [.5]]
VALUES = dict(
    img_size=[16, 28, (16, 24), (24, 16), 30, (28, 28, 28), (0, 28), *WHOLE],
    patch_size=[2, 4, (4, 2), (2, 4), 5, 28, 56, *WHOLE],
    in_chans=[1, 2, 3, 5, *WHOLE],
    embed_dim=[16, 24, 48, 50, 7, *WHOLE],
    depth=[4, 1, 2, *WHOLE],
    depths=[(1, 1), (1,), (1, 0), (1, -1), (1, 1.5), (), (1,)*12, *WHOLE],
    num_heads=[1, 2, 3, 5, (1, 2), (5, 3), (0, 3), (-1, 3), *WHOLE],
    drop_path=[0., .1, .9, *REAL],
    init_values=[.1, 1e-5, 0, *REAL],
    init_std=[.02, .1, 0, *REAL],
    vocab_size=[2, 32, 1, *WHOLE],
    mask_ratio=[.1, .4, .75, .99, .001, *REAL],
    min_block=[1, 4, 40, 1000, *WHOLE],
    shared_bias=[True, False, 'no', 2, None],
    tau=[.5, 4., 0, *REAL], tau_sim=[.5, 1., 0, *REAL], omega=[0, .2, 1, 2, *REAL],
    detach=[True, False, 'no', None],
    decoder_dim=[16, 32, 18, *WHOLE],
    decoder_depth=[0, 1, *WHOLE],
    decoder_heads=[1, 2, 5, *WHOLE],
    norm_pix=[True, False, 'yes', 1., None],
    taps=[[1, 4], [4], [0, 4], [4, 2], [2], [], 4, 'all', [NAN, 4], [True, 4]],
    target_kind=['pixels', 'features', 'tokens', 3], feature_dim=[8, *WHOLE],
    query_depth=[1, 2, 3, 4, *WHOLE],
    share_weight=[True, False, 'no'],
    order=['random', 'raster', 'spiral', None, 3],
    blur=[None, (3, .5), (4, 1.), (3, 0), (3, NAN), (NAN, 1.), (99, 1.), 3, 'soft', (3,), (3, '1')],
    window=[None, 7, 2, (7, 7), 5, (7,), *WHOLE],
    mean=[0., .5, [.1, .2], NAN, math.inf, 'a', [[1]], []],
    std=[1., .2, 0, -1, NAN, math.inf, 'a', []])

def takes(m): return len(m.mean.flatten()), *m.img_size

def use(m, folder):
    "Run, train, export and load: what a user will want of it"
    images = torch.rand(2, *takes(m))
    target = None
    if hasattr(m, 'set_tokenizer'):
        logits = torch.randn(2, m.num_patches, m.head.out_features)
        target = logits if hasattr(m, 'tau') else logits.argmax(-1)
    if getattr(m, 'target_kind', '')=='features': target = torch.randn(2, m.num_patches, m.feature_dim)
    m.train()
    opt = torch.optim.AdamW(m.parameters(), 1e-3)
    out = m(images, target=target)
    out.loss.backward()
    opt.step()
    assert out.loss.isfinite() and out.pred.isfinite().all()
    assert all(p.isfinite().all() for p in m.parameters())
    if target is None: assert all(len(row)<=2 for row in m.pictures(images, out.mask).values())
    m.eval()
    save_encoder(m, folder)
    torch.testing.assert_close(features(load_encoder(folder), images), features(m, images), rtol=1e-4, atol=1e-4)

SMALL = dict(embed_dim=24, depth=4, num_heads=2, vocab_size=16, decoder_dim=16, decoder_depth=1)
SMALL_MIXMIM = dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), decoder_dim=16, decoder_depth=1)

def draw(name, seed):
    "Small sizes with one to three arguments replaced"
    rng = random.Random(f'{name} {seed}')
    cls = methods[name]
    mro = {k for c in cls.__mro__ if '__init__' in vars(c) for k in inspect.signature(c.__init__).parameters}
    known = [k for k in VALUES if k in mro and k in inspect.signature(cls).parameters]
    small = SMALL_MIXMIM if name=='mixmim' else {k: v for k,v in SMALL.items() if k in known}
    some = rng.sample(known, rng.randint(1, 3))
    return small | {k: rng.choice(VALUES[k][:2] if rng.random()<.5 else VALUES[k]) for k in some}     # the first two are good ones

@pytest.mark.parametrize('name', methods)
def test_what_is_built_works_and_all_else_is_a_sentence(name, tmp_path):
    built = refused = 0
    for seed in range(70):
        given = draw(name, seed)
        torch.manual_seed(seed)
        try: m = create(name, **given)
        except ValueError as e:
            refused += 1
            assert len(str(e))>20 and '\n' not in str(e), given
            continue
        except BaseException as e: raise AssertionError(f'{name} {given}: {type(e).__name__}: {e}') from e
        try: use(m, tmp_path/str(seed))
        except BaseException as e: raise AssertionError(f'{name} {given} was built, but: {type(e).__name__}: {e}') from e
        built += 1
    assert built>=15 and refused>=15
