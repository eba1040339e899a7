"The playground's JavaScript draws the masks of the library; the glossary and the pages on papers name what exists; thumbnails"
import importlib, json, re, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from mim_nb.masks import block_mask, random_mask
from mim_nb.methods import methods

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
from thumbs import chapters, put_map

def in_node(code):
    "What a piece of JavaScript returns that has the playground as `p`"
    if not shutil.which('node'): pytest.skip('the playground is JavaScript, and there is no node to run it')
    code = f"const p = require({json.dumps(str(ROOT/'nbs'/'playground.js'))}); console.log(JSON.stringify((() => {{ {code} }})()))"
    return json.loads(subprocess.run(['node', '-e', code], check=True, capture_output=True, text=True, timeout=60).stdout)

SEEDS = 'Array.from({length: 2000}, (_, i) => p.makeRandom(i))'

@pytest.mark.parametrize('length,ratio', [(49, .75), (196, .75), (49, .4), (49, .05), (196, .95)])
def test_random_masks_hide_as_many_as_ours(length, ratio):
    counts = in_node(f"return {SEEDS}.map(r => p.randomMask({length}, {ratio}, r).filter(x => x).length)")
    assert set(counts)=={random_mask(1, length, ratio).sum().item()}

def test_random_masks_hide_every_patch_alike():
    masks = torch.tensor(in_node(f"return {SEEDS}.map(r => p.randomMask(49, .75, r))")).float()
    assert (masks.mean(0)-37/49).abs().max()<.05 and len(masks.unique(dim=0))==len(masks)

def test_cells_are_half():
    assert set(in_node(f"return {SEEDS}.map(r => p.cellMask(49, .5, r).filter(x => x).length)"))=={24}

def test_orders_are_permutations():
    orders = torch.tensor(in_node(f"return {SEEDS}.map(r => p.randomOrder(49, r))"))
    assert (orders.sort(1).values==torch.arange(49)).all()

@pytest.mark.parametrize('grid,wanted,least,aspect', [((14,14), 75, 16, .3), ((7,7), 19, 4, .3), ((7,7), 40, 1, .1), ((5,9), 20, 3, 1.)])
def test_blocks_stay_on_the_grid_and_within_the_count(grid, wanted, least, aspect):
    drawn = in_node(f"return {SEEDS}.map(r => p.blockMask({grid[0]}, {grid[1]}, {wanted}, {least}, {aspect}, r))")
    for d in drawn:
        hidden = sum(d['mask'])
        assert hidden<=wanted and hidden==sum(len(b['added']) for b in d['blocks'])
        assert {i for b in d['blocks'] for i in b['added']}=={i for i,m in enumerate(d['mask']) if m}
        for b in d['blocks']:
            assert 0<b['h']<grid[0] and 0<b['w']<grid[1] and 0<=b['top']<=grid[0]-b['h'] and 0<=b['left']<=grid[1]-b['w']

def test_blocks_have_the_statistics_of_block_mask():
    theirs = torch.tensor(in_node(f"return {SEEDS}.map(r => p.blockMask(14, 14, 75, 16, .3, r).mask)"))
    ours = block_mask(2000, 14, 75, generator=torch.Generator().manual_seed(0))
    for what in (lambda m: m.sum(1).float().mean(), lambda m: 50*(m.sum(1)==75).float().mean()): assert abs(what(theirs)-what(ours))<2.5
    assert (theirs.float().mean(0)-ours.float().mean(0)).abs().max()<.08

def test_every_choice_of_the_page_can_be_drawn():
    text = in_node("""const said = {}
        for (const method of ['blocks', 'random', 'cells', 'order']) said[method] = p.draw({method, grid: 7, ratio: 50, block: 4, aspect: .3, turns: 16}, 3).text
        return said""")
    assert text['random'].startswith('25 of 49') and text['cells'].startswith('24 of 49') and text['order'].startswith('33 of 49') and 'blocks' in text['blocks']

def markdown(name): return '\n'.join(''.join(c['source']) for c in json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text())['cells'] if c['cell_type']=='markdown')

ENTRIES = [e.split('\n', 1) for e in re.split(r'^### ', markdown('21_glossary'), flags=re.M)[1:]]

# steps and arguments of the methods, which are no exported names of their own
ARGUMENTS = {'mask', 'mask_ratio', 'norm_pix', 'drop_path', 'forward', 'encode', 'decode', 'target'}

def exists(symbol):
    "Is `Class.member` or `function` exported by one of the modules, or a command?"
    modules = [importlib.import_module(f'mim_nb.{p.stem}') for p in sorted((ROOT/'mim_nb').glob('[a-z]*.py'))]
    name,*members = symbol.split('.')
    found = [getattr(m, name) for m in modules if name in getattr(m, '__all__', ())]
    return bool(found) and all(hasattr(found[0], o) for o in members)

def test_glossary_is_alphabetical():
    terms = [t for t,_ in ENTRIES]
    assert terms==sorted(terms, key=str.casefold) and len(set(terms))==len(terms)>=50

def test_glossary_says_where():
    here = {t: body.partition('*Here:*')[2] for t,body in ENTRIES}
    assert [t for t,h in here.items() if not re.search(r'\]\([\w]+\.ipynb\)|`\w', h)]==[]
    symbols = {s for h in here.values() for s in re.findall(r'`([\w.]+)`', h)} - ARGUMENTS
    assert sorted(s for s in symbols if not exists(s))==[]

PAGES = ['index', '21_glossary', '02b_playground', *sorted(p.stem for p in (ROOT/'nbs').glob('20*_paper.ipynb'))]

@pytest.mark.parametrize('name', PAGES)
def test_links_between_notebooks_lead_somewhere(name):
    links = re.findall(r'\]\(([\w/.-]+\.ipynb)', markdown(name))
    assert links and [l for l in links if not (ROOT/'nbs'/l).exists()]==[]

def test_front_page_leads_to_every_notebook():
    links = set(re.findall(r'\]\(([\w.-]+\.ipynb)', markdown('index')))
    assert {p.name for p in (ROOT/'nbs').glob('*.ipynb')}-{'index.ipynb'}==links

def test_map_has_every_chapter_in_order():
    there = [nb for part in chapters(ROOT/'nbs') for _,nb,_ in part]
    assert there==sorted(there) and set(there)=={p.name for p in (ROOT/'nbs').glob('[01]*.ipynb')}

def test_map_gets_thumbnails(tmp_path):
    n = len(chapters(ROOT/'nbs'))
    (tmp_path/'index.html').write_text('a' + '<!-- map --> <table></table> <!-- /map -->'*n + 'z')
    count,html = put_map(ROOT/'nbs', tmp_path),(tmp_path/'index.html').read_text()
    assert html[0]=='a' and html[-1]=='z' and 'table' not in html and html.count('<li>')==count
    for src in re.findall(r'src="(.+?)"', html): assert Image.open(tmp_path/src).size==(200,120) and (tmp_path/src).stat().st_size<40_000
    assert 'href="beit.html"' in html and 'src="thumbs/beit.png"' in html
    with pytest.raises(ValueError, match='has 0 maps'): put_map(ROOT/'nbs', tmp_path)

def test_picture_of_the_front_page_shows_every_method():
    front = np.load(ROOT/'results'/'front.npz')
    assert list(front['names'])==list(methods) and 'command' in json.loads(str(front['about']))
    for n in methods: assert front[n].shape==(3,4,28,28) and front[n].dtype==np.uint8
    clear = {n: (front[n][1,3]==0).any() for n in methods}
    assert clear==dict(beit=False, mcbeit=False, mae=True, deepmim=True, saim=True, mixmim=False)       # who leaves patches out
