"Masks: counts, determinism, the published statistics of BEiT's blocks, errors"
import json, math
from pathlib import Path
from random import Random
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from mim_nb.masks import _try_blocks, block_mask, make_cells, make_mask, make_order, num_hidden, pick, random_mask, random_order

REF = json.loads((Path(__file__).parent/'parity'/'blockwise_mask_a.json').read_text())
few = settings(max_examples=60, deadline=None, derandomize=True)
def gen(seed=0): return torch.Generator().manual_seed(seed)

# BEiT's definition, one mask and one try at a time
def try_block(mask, room, u, min_block=16, min_aspect=.3):
    H,W = mask.shape
    area,side = min_block+u[0]*(room-min_block), math.exp((.5-u[1])*math.log(min_aspect))
    h,w = round(math.sqrt(area)*side), round(math.sqrt(area)/side)
    if h>=H or w>=W: return None
    top,left = int(u[2]*(H-h+1)), int(u[3]*(W-w+1))
    block = slice(top,top+h), slice(left,left+w)
    return block if 0 < h*w-mask[block].sum() <= room else None

def loop_mask(grid, num_masked, rand, max_block=None, **kw):
    mask,left = np.zeros(grid, dtype=bool), num_masked
    while left>0:
        room = min(left, max_block or left)
        block = next((b for b in (try_block(mask, room, (rand(),rand(),rand(),rand()), **kw) for _ in range(10)) if b), None)
        if block is None: break
        mask[block] = True; left = num_masked-mask.sum()
    return mask

def components(masks):
    "4-neighbour connected components of each mask `(n,H,W)`: the largest label floods each of them"
    m = np.pad(masks, ((0,0),(1,1),(1,1)))
    label = np.where(m, np.arange(1, m[0].size+1, dtype=np.int16).reshape(m[0].shape), 0).astype(np.int16)
    start = label.copy()
    while True:
        new = label.copy()
        for axis in 1,2:
            for shift in 1,-1: np.maximum(new, np.roll(new, shift, axis), out=new); new *= m
        if (new==label).all(): return ((start==label)&m).sum((1,2))
        label = new

@few
@given(st.integers(1,5), st.integers(2,200), st.floats(.01,.99), st.integers(0,99))
def test_random_mask(n, length, ratio, seed):
    k = length-int(length*(1-ratio))
    if not 0<k<length: pytest.raises(ValueError, random_mask, n, length, ratio); return
    m = random_mask(n, length, ratio, gen(seed))
    assert m.shape==(n,length) and m.dtype==torch.bool and m.sum(1).eq(k).all() and k==num_hidden(length, ratio)
    assert torch.equal(m, random_mask(n, length, ratio, gen(seed)))
    order = random_order(n, length, gen(seed))
    assert torch.equal(m, torch.zeros_like(m).scatter(1, order[:,:k], True))

@few
@given(st.integers(1,5), st.integers(1,200), st.integers(0,99))
def test_random_order(n, length, seed):
    order = random_order(n, length, gen(seed))
    assert order.dtype==torch.long and torch.equal(order.sort(1).values, torch.arange(length).expand(n,-1))
    assert torch.equal(order, random_order(n, length, gen(seed)))

def test_random_is_uniform():
    m = random_mask(20000, 49, .75, gen(1)).float()
    p = 37/49; assert ((m.mean(0)-p).abs() < 3.5*math.sqrt(p*(1-p)/20000)).all()
    o = random_order(24000, 4, gen(1)); ways = torch.unique(o, dim=0, return_counts=True)[1]
    assert len(ways)==24 and (ways-1000).abs().max() < 4*math.sqrt(1000)

grids = st.tuples(st.integers(2,16), st.integers(2,16))
@few
@given(st.data(), grids, st.integers(1,40), st.integers(0,99), st.floats(.05,1))
def test_block_mask_never_hides_more(data, grid, n, seed, aspect):
    L = grid[0]*grid[1]
    num,low = data.draw(st.integers(1,L)), data.draw(st.integers(1,L))
    high = data.draw(st.one_of(st.none(), st.integers(low, L+9)))
    def draw(): return block_mask(n, grid, num, low, high, aspect, gen(seed))
    m = draw()
    assert m.shape==(n,L) and m.dtype==torch.bool and m.sum(1).max()<=num and torch.equal(m, draw())

@pytest.mark.parametrize('grid,num,low', [(7,19,4), (14,75,16), ((6,9),20,4), (16,102,16), ((260,30),600,50)])
def test_block_mask_comes_close(grid, num, low):
    count = block_mask(500, grid, num, low, generator=gen()).sum(1)
    assert count.max()==num and count.min()>0 and count.float().mean()>.97*num

@pytest.mark.parametrize('n', [1,2,3,17,300,3000])
def test_block_mask_any_batch(n):
    "However many tries a step makes, the count has the same distribution"
    count = torch.cat([block_mask(n, 14, 75, generator=g) for g in [gen(n)] for _ in range(max(1, 600//n))]).sum(1).float()
    assert abs(count.mean()-74.474) < 4*.98/math.sqrt(len(count)) and count.max()<=75

def test_max_block():
    "One block adds at most max_block, so n blocks at most n times as many"
    m = block_mask(500, 14, 75, 4, 6, generator=gen())
    loop = np.stack([loop_mask((14,14), 75, rand, max_block=6, min_block=4) for rand in [Random(0).random] for _ in range(500)])
    a,b = components(m.reshape(-1,14,14).numpy()), components(loop)
    assert a.mean()>3 and abs(a.mean()-b.mean()) < 3.5*math.sqrt((a.var()+b.var())/500)

@pytest.mark.parametrize('grid,num,low,aspect', [((14,14),75,16,.3), ((7,7),19,4,.3), ((5,11),30,3,.1), ((14,14),75,16,1.)])
def test_same_numbers_same_blocks(grid, num, low, aspect):
    g = gen(2); H,W = grid
    masks = block_mask(400, grid, max(1, num*3//4), low, None, aspect, g).T.reshape(H,W,-1); room = num-masks.sum((0,1)).float()
    u = torch.rand(4,3,400, generator=g); rows,cols,new = _try_blocks(masks, room, u, low, aspect)
    blocks = (rows&cols[None])
    for i in range(400):
        for k in range(3):
            want = try_block(masks[:,:,i].numpy(), int(room[i]), u[:,k,i].tolist(), low, aspect)
            assert (want is None)==(new[k,i]<=0)
            if want:
                b = np.zeros(grid, bool); b[want] = True
                assert (b==blocks[:,:,k,i].numpy()).all() and new[k,i]==(b&~masks[:,:,i].numpy()).sum()

@pytest.fixture(scope='module')
def drawn():
    s = REF['setting']
    return block_mask(20000, s['input_size'], s['num_masking_patches'], s['min_num_patches'], s['max_num_patches'],
                      s['min_aspect'], generator=gen(3)).reshape(-1,14,14).numpy()

def agree(x, mean, std, n=REF['masks']):
    err = math.sqrt(x.var()/len(x) + std**2/n)
    assert abs(x.mean()-mean) < 3*err, (x.mean(), mean, err)

def test_published_counts(drawn):
    c,x = REF['masked_count'],drawn.sum((1,2)); p = c['fraction_exactly_at_target']
    agree(x, c['mean'], c['std']); agree(x==75, p, math.sqrt(p*(1-p))); assert x.max()==c['max']
    a,b = np.bincount(x, minlength=76)[68:76]/20000, np.array(c['histogram']['counts'])[68:76]/20000
    assert (abs(a-b) < 3*np.sqrt((a+b)/20000)).all()

def test_published_frequency_map():
    "Eight times as many masks as were published, so that nearly all the noise among the 196 entries is the published map's own"
    n,q = 160_000,np.array(REF['frequency_map']['values'])
    mine = sum(block_mask(20_000, 14, 75, generator=g).sum(0).numpy() for g in [gen(0)] for _ in range(8)).reshape(14,14)/n
    z = (mine-q)/np.sqrt(q*(1-q)*(1/n+1/REF['masks']))
    assert abs(z).max()<3 and .6<(z**2).mean()<1.4, (abs(z).max(), (z**2).mean())

@pytest.mark.parametrize('name,flip', [('connected_components',False), ('unmasked_components',True)])
def test_published_components(drawn, name, flip):
    agree(components(drawn^flip), REF[name]['mean'], REF[name]['std'])

def test_published_neighbours(drawn):
    def pairs(f): return f(drawn[:,1:],drawn[:,:-1]).sum((1,2)) + f(drawn[:,:,1:],drawn[:,:,:-1]).sum((1,2))
    for name,f in dict(both_masked=lambda a,b: a&b, both_unmasked=lambda a,b: ~(a|b), same_value=lambda a,b: a==b, different_value=lambda a,b: a!=b).items():
        agree(pairs(f), REF['neighbour_pairs'][name]['mean'], REF['neighbour_pairs'][name]['std'])

def test_components_themselves():
    x = np.array([[1,0,1,0],[1,1,0,0],[0,0,1,1],[1,0,0,1]], bool)[None]
    assert components(x).tolist()==[4] and components(~x).tolist()==[3]

def test_generator_goes_on_and_global_seed():
    g = gen(); a,b = block_mask(8, 14, 75, generator=g),block_mask(8, 14, 75, generator=g)
    assert not torch.equal(a,b)
    torch.manual_seed(5); a = block_mask(8, 14, 75), random_mask(8, 196, .4), random_order(8, 196)
    torch.manual_seed(5); assert all(map(torch.equal, a, (block_mask(8, 14, 75), random_mask(8, 196, .4), random_order(8, 196))))
    state = torch.get_rng_state(); block_mask(8, 14, 75, generator=g); assert torch.equal(state, torch.get_rng_state())

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu():
    for f in (lambda **k: random_mask(64, 196, .75, **k), lambda **k: random_order(64, 196, **k), lambda **k: block_mask(64, 14, 75, **k)):
        assert f(device='cuda').device.type=='cuda'
        assert torch.equal(f(generator=gen(), device='cuda').cpu(), f(generator=gen()))
        there = torch.Generator('cuda').manual_seed(0); assert f(generator=there).device.type=='cuda'
    count = block_mask(4096, 14, 75, generator=torch.Generator('cuda').manual_seed(0)).sum(1).float()
    assert count.max()==75 and abs(count.mean().item()-74.474)<4*.98/64

@pytest.mark.parametrize('f,msg', [
    (lambda: random_mask(2, 49, 0), 'between 0 and 1'), (lambda: random_mask(2, 49, 1.), 'between 0 and 1'),
    (lambda: random_mask(2, 4, .9), 'hides 4 of 4'), (lambda: random_mask(2, 49, 1e-20), 'hides 0 of 49'),
    (lambda: random_mask(0, 49, .5), 'at least 1 image'), (lambda: random_order(2, 0), 'at least 1 patch'),
    (lambda: block_mask(0, 14, 75), 'at least 1 image'), (lambda: block_mask(2, 14, 0), 'num_masked is 0'),
    (lambda: block_mask(2, 14, 197), 'num_masked is 197'), (lambda: block_mask(2, (1,9), 3, 1), 'one row or column'),
    (lambda: block_mask(2, 3, 5), 'min_block is 16'), (lambda: block_mask(2, 14, 75, 0), 'min_block is 0'),
    (lambda: block_mask(2, 14, 75, 16, 15), 'max_block 15 is smaller'),
    (lambda: block_mask(2, 14, 75, min_aspect=0), 'min_aspect'), (lambda: block_mask(2, 14, 75, min_aspect=1.1), 'min_aspect')])
def test_errors(f, msg):
    with pytest.raises(ValueError, match=msg): f()

# What a method works with

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**30), st.integers(1, 6), st.integers(2, 60), st.floats(.05, .95))
def test_a_known_count_gives_the_same_places_as_looking(seed, n, length, ratio):
    hidden = random_mask(n, length, min(max(ratio, 1/length+1e-6), 1-1/length-1e-6), torch.Generator().manual_seed(seed))
    known,looked = make_mask(hidden, int(hidden[0].sum())),make_mask(hidden)
    assert all(torch.equal(a, b) for a,b in zip(known[:3], looked[:3])) and known.count==looked.count==int(hidden[0].sum())
    x = torch.randn(n, length, 3)
    assert torch.equal(pick(x, known.hidden_at), x[hidden]) and torch.equal(pick(x, known.shown_at), x[~hidden])

def test_rows_that_differ_have_no_count():
    hidden = block_mask(64, 7, 19, 4, generator=torch.Generator().manual_seed(0))
    mask = make_mask(hidden)
    assert mask.count is None and len(mask.hidden_at)==hidden.sum() and len(mask.hidden_at)+len(mask.shown_at)==64*49
    hidden[0] = True                                   # what was made into a value before is not affected
    assert len(mask.hidden_at)+len(mask.shown_at)==64*49

def test_a_mask_travels_as_one():
    mask = make_mask(random_mask(2, 9, .5), 5).to('meta')
    assert all(t.is_meta for t in mask[:3]) and mask.count==5 and mask.tensor is mask.hidden
    order = make_order(random_order(2, 9)).to('meta')
    assert order.order.is_meta and order.turn.is_meta and make_cells(torch.zeros(4, dtype=torch.bool)).to('meta').partner.is_meta

def test_no_place_is_remembered_outside_the_value():
    "A mask that is cloned, sliced or written to through NumPy is an ordinary tensor"
    mask = random_mask(3, 49, .75)
    mask.numpy()[:] = False
    mask[0,:5] = True
    assert make_mask(mask).hidden_at.tolist()==[0, 1, 2, 3, 4]
    order = random_order(2, 9)
    order[0,0] = order[0,1]
    with pytest.raises(ValueError, match='exactly once'): make_order(order)

@pytest.mark.parametrize('make,bad', [(make_mask, torch.rand(2,9)), (make_mask, torch.zeros(9, dtype=torch.bool)), (make_mask, [[True, False]]), (make_mask, torch.zeros(2,9,dtype=torch.long)),
    (make_order, torch.rand(2,9)), (make_order, torch.arange(9)), (make_order, torch.zeros(2,9,dtype=torch.long)), (make_cells, torch.zeros(2,9,dtype=torch.bool)), (make_cells, torch.zeros(9))])
def test_what_is_no_mask_order_or_cells(make, bad):
    with pytest.raises(ValueError): make(bad)
