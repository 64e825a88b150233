# The one product kernel: a tile of R vectors × C columns stays in registers over the whole sum,
#
#     to[r, c] = from[r, c] + Σ_s A[s][r] · B[s, c].
#
# A is read as vectors (R·W numbers per term of the sum, contiguous or at a stride), B as broadcast scalars. Forward:
# A = Ŵ by columns, B = x; backward: A = Ŵ by rows, B = λ; gradient: A = x, B = λ, the sum over steps and trials.

"What is added to and where the result goes: columns `column` bytes apart."
struct Tile{T}
    from::Ptr{T}
    to::Ptr{T}
    column::Int
end
@inline moved(tile::Tile{T}, bytes::Int) where {T} = Tile{T}(tile.from + bytes, tile.to + bytes, tile.column)

"Compute one tile. Strides are in bytes: `a_step`, `b_step` per term of the sum, `b_column` per column."
@generated function tile!(tile::Tile{T}, ::Val{R}, ::Val{C}, A::Ptr{T}, a_step::Int, B::Ptr{T}, b_step::Int,
        b_column::Int,
                          terms::Int) where {T,R,C}
    V = Vec{lanes(T),T}
    acc(r, c) = Symbol(:acc_, r, :_, c)
    at(r, c) = :($c * tile.column + $(r * REGISTER_BYTES))
    # Columns in turn: see `product!`.
    starts = [:($(acc(r, c)) = vload($V, tile.from + $(at(r, c)))) for c in 0:C-1 for r in 0:R-1]
    ends = [:(vstore!(tile.to + $(at(r, c)), $(acc(r, c)))) for c in 0:C-1 for r in 0:R-1]
    loads = [:($(Symbol(:a_, r)) = vload($V, A + $(r * REGISTER_BYTES))) for r in 0:R-1]
    updates = Expr[]
    for c in 0:C-1
        push!(updates, :(b = splat($V, unsafe_load(B + $c * b_column))))
        append!(updates, [:($(acc(r, c)) = vfma($(Symbol(:a_, r)), b, $(acc(r, c)))) for r in 0:R-1])
    end
    quote
        $(Expr(:meta, :inline))
        $(starts...)
        for _ in 1:terms
            $(loads...)
            $(updates...)
            A += a_step
            B += b_step
        end
        $(ends...)
        nothing
    end
end

"How a product is cut into tiles: panels of `height` vectors (the last one `rest`), columns in near-equal tiles."
struct TilePlan
    vectors::Int
    height::Int
    width::Int       # most columns of a tile of a full panel
    rest_width::Int  # most columns of a tile of the last panel
end

"Most columns beside R vectors: accumulators, the R vectors and one broadcast share the registers."
max_columns(R::Int) = min((NUM_REGISTERS - 1 - R) ÷ R, MAX_COLUMNS)
const MAX_COLUMNS = 12
const MAX_VECTORS = NUM_REGISTERS == 16 ? 8 : 12

# Cycles per term of the sum: two FMAs a cycle, four cycles' latency, two loads a cycle.
_tile_cost(R, C) = max(R * C / 2, 4.0, (R + C) / 2) + 0.5
function _panel_cost(R, columns, C)
    tiles = cld(columns, C)
    wide = columns % tiles == 0 ? tiles : columns % tiles
    low = columns ÷ tiles
    columns % tiles == 0 ? tiles * _tile_cost(R, low) :
        wide * _tile_cost(R, low + 1) + (tiles - wide) * _tile_cost(R, low)
end

"Cheapest plan for `vectors` × `columns`; `one_width` gives the last panel's tiles the others' width."
function plan_tiles(vectors::Int, columns::Int, one_width::Bool = false)
    best, least = TilePlan(vectors, 1, max_columns(1), max_columns(1)), Inf
    for R in 1:min(MAX_VECTORS, vectors)
        C = max_columns(R)
        C < 1 && continue
        rest = vectors % R
        D = rest == 0 || one_width ? C : max_columns(rest)
        cost = (vectors ÷ R) * _panel_cost(R, columns, C) + (rest == 0 ? 0.0 : _panel_cost(rest, columns, D))
        if cost < least
            best, least = TilePlan(vectors, R, C, D), cost
        end
    end
    best
end

num_panels(p::TilePlan) = cld(p.vectors, p.height)
"First vector and height of panel k (from 0)."
@inline panel(p::TilePlan, k::Int) = (k * p.height, min(p.height, p.vectors - k * p.height))

"""
    product!(tile, plan, A, a_step, B, b_step, b_column, terms, columns)

All tiles of a product; `tile` is that of the first vector and column. A is packed in panels (`a_step` = 0) or has its
vectors side by side, `a_step` bytes per term; B likewise is packed in the tiles' columns (`b_step` = 0), or strided.

The last panel goes first: its last vector may run over the end of a column, onto numbers of the next column that the
first panel then writes. So `from` and `to` must not overlap, unless columns are whole vectors.
"""
@inline function product!(tile::Tile{T}, p::TilePlan, A::Ptr{T}, a_step::Int, B::Ptr{T}, b_step::Int, b_column::Int,
                          terms::Int, columns::Int) where {T}
    sz = sizeof(T)
    packed_B = b_step == 0
    move = packed_B ? terms * sz : b_column  # of B per column
    for k in num_panels(p)-1:-1:0
        first, R = panel(p, k)
        skip = first * REGISTER_BYTES
        panel_A, step = a_step == 0 ? (A + terms * skip, R * REGISTER_BYTES) : (A + skip, a_step)
        width = R == p.height ? p.width : p.rest_width
        # columns in near-equal tiles of at most `width`
        tiles = cld(columns, width)
        low, wide = divrem(columns, tiles)
        done = wide * (low + 1)
        at = moved(tile, skip)
        _tiles_of_size!(at, R, low + 1, wide, panel_A, step, B, packed_B ? (low + 1) * sz : b_step, b_column, move,
            terms)
        _tiles_of_size!(moved(at, done * tile.column), R, low, tiles - wide, panel_A, step, B + done * move,
                        packed_B ? low * sz : b_step, b_column, move, terms)
    end
    nothing
end

# Static sizes out of dynamic ones: one branch per size that fits the registers.
@generated function _tiles_of_size!(tile::Tile{T}, R::Int, C::Int, count::Int, A::Ptr{T}, a_step::Int, B::Ptr{T},
        b_step::Int,
                                    b_column::Int, move::Int, terms::Int) where {T}
    body = :(error("no tile of $R x $C"))
    for r in MAX_VECTORS:-1:1
        columns = :(error("no tile of $R x $C"))
        for c in 1:max_columns(r)
            columns = Expr(:if, :(C == $c),
                :(_tiles!(tile, Val($r), Val($c), count, A, a_step, B, b_step, b_column, move, terms)), columns)
        end
        body = Expr(:if, :(R == $r), columns, body)
    end
    :(count == 0 ? nothing : $body)
end

@noinline function _tiles!(tile::Tile{T}, r::Val, c::Val{C}, count::Int, A::Ptr{T}, a_step::Int, B::Ptr{T}, b_step::Int,
                           b_column::Int, move::Int, terms::Int) where {T,C}
    for _ in 1:count
        tile!(tile, r, c, A, a_step, B, b_step, b_column, terms)
        tile = moved(tile, C * tile.column)
        B += C * move
    end
    nothing
end

"""
Pack `terms` rows of N numbers, as columns of tiles of a panel of `width` columns at most: `b_step` = 0 of `product!`. All
of the plan's panels must have that width.
"""
function pack_columns!(dst::Ptr{T}, rows::Ptr{T}, terms::Int, N::Int, width::Int) where {T}
    tiles = cld(N, width)
    low, wide = divrem(N, tiles)
    c = 0
    for k in 1:tiles
        C = k <= wide ? low + 1 : low
        out = dst + c * terms * sizeof(T)
        for s in 0:terms-1, l in 0:C-1
            unsafe_store!(out, unsafe_load(rows, s * N + c + l + 1), s * C + l + 1)
        end
        c += C
    end
    nothing
end

"""
Pack a row-major matrix of N columns into panels: panel k holds, for each of the sum's terms s, its R·W numbers
contiguously, zeros beyond N. `by_columns`: number i of term s is matrix[i, s] (forward, N terms), else matrix[s, i].
"""
function pack!(dst::Ptr{T}, matrix::Ptr{T}, N::Int, p::TilePlan, by_columns::Bool, terms::Int = N) where {T}
    W = lanes(T)
    out = dst
    for k in 0:num_panels(p)-1
        first, R = panel(p, k)
        i0 = first * W
        width = R * W
        valid = clamp(N - i0, 0, width)
        if by_columns
            for l in 0:valid-1
                row = matrix + (i0 + l) * N * sizeof(T)
                @simd ivdep for s in 0:N-1
                    unsafe_store!(out, unsafe_load(row, s + 1), s * width + l + 1)
                end
            end
        else
            for s in 0:terms-1
                unsafe_copyto!(out + s * width * sizeof(T), matrix + (s * N + i0) * sizeof(T), valid)
            end
        end
        if valid < width
            for s in 0:terms-1, l in valid:width-1
                unsafe_store!(out, zero(T), s * width + l + 1)
            end
        end
        out += terms * width * sizeof(T)
    end
    nothing
end

"Numbers that a packed matrix takes."
packed_length(N::Int, p::TilePlan, ::Type{T}) where {T} = N * p.vectors * lanes(T)

# Twelve chains of multiply–adds that stay in registers: enough to hide their latency, two a cycle or one.
@generated function chains(count::Int, x::Float32)
    V = Vec{lanes(Float32),Float32}
    a(i) = Symbol(:a_, i)
    quote
        factor, summand = splat($V, x), splat($V, 1.0f0)
        $((:($(a(i)) = splat($V, $(Float32(i)))) for i in 1:12)...)
        for _ in 1:count
            $((:($(a(i)) = vfma($(a(i)), factor, summand)) for i in 1:12)...)
        end
        +($((:($(a(i))[1].value) for i in 1:12)...))
    end
end

"Single-precision floating-point operations a second that `threads` threads reach in registers: what no product beats."
function peak_flops(threads::Integer)
    count = 2_000_000
    best = 0.0
    for _ in 1:5
        began = time_ns()
        Threads.@threads for _ in 1:threads
            chains(count, 0.5f0) > 0 || error("unreachable")
        end
        best = max(best, threads * count * 24 * lanes(Float32) / (time_ns() - began) * 1e9)
    end
    best
end
