# Elementary functions on vectors.
#
# exp, expm1 and log follow from two reductions. The series that remain are Taylor's, cut where the next term is below
# rounding; in single precision some of them, and tanh as a whole, are fits of least maximal error instead (below).
#   exp:  x = n ln 2 + r, |r| <= ln(2)/2;  exp(x) − 1 = (2ⁿ − 1) + 2ⁿ (exp(r) − 1), which keeps small results exact
#   log:  u = 2ᵉ m, √½ <= m < √2;          log(m) = 2 atanh(s), s = (m − 1)/(m + 1), |s| <= 0.172

@inline vconst(::Type{V}, x) where {W,T,V<:Vec{W,T}} = splat(V, T(x))

"""
Σ c[k] xᵏ by Estrin's rule: even and odd powers apart, again and again. The chain of dependent operations is what bounds
a loop over such functions, and this one is short.
"""
@inline polynomial(x::V, c::Tuple{Any}) where {V<:Vec} = vconst(V, c[1])
@inline polynomial(x::V, c::Tuple{Any,Any}) where {V<:Vec} = vfma(x, vconst(V, c[2]), vconst(V, c[1]))
@inline polynomial(x::V, c::Tuple{Any,Any,Any}) where {V<:Vec} = vfma(x, vfma(x, vconst(V, c[3]), vconst(V, c[2])),
    vconst(V, c[1]))
@inline function polynomial(x::V, c::Tuple) where {V<:Vec}
    x2 = vmul(x, x)
    vfma(x, polynomial(x2, odds(c)), polynomial(x2, evens(c)))
end
@inline evens(c::Tuple{Any}) = c
@inline evens(c::Tuple{Any,Any}) = (c[1],)
@inline evens(c::Tuple) = (c[1], evens(Base.tail(Base.tail(c)))...)
@inline odds(c::Tuple{Any,Any}) = (c[2],)
@inline odds(c::Tuple{Any,Any,Any}) = (c[2],)
@inline odds(c::Tuple) = (c[2], odds(Base.tail(Base.tail(c)))...)

# (exp(r) − 1)/r, 2 atanh(s)/s in s², sin(y)/y and cos(y) in y²
_expm1_terms(::Type{Float32}) = ntuple(k -> 1 / factorial(k), 7)
_expm1_terms(::Type{Float64}) = ntuple(k -> 1 / factorial(k), 14)
_atanh_terms(::Type{Float64}) = ntuple(k -> 2 / (2k - 1), 11)
_log1p_terms(::Type{Float32}) = ntuple(k -> 2 / (2k - 1), 8)
_log1p_terms(::Type{Float64}) = ntuple(k -> 2 / (2k - 1), 17)
_sin_terms(::Type{Float64}) = ntuple(k -> (-1)^(k - 1) / factorial(2k - 1), 9)
_cos_terms(::Type{Float64}) = ntuple(k -> (-1)^(k - 1) / factorial(2k - 2), 10)
for name in (:_expm1_terms, :_atanh_terms, :_log1p_terms, :_sin_terms, :_cos_terms), T in (:Float32, :Float64)
    T === :Float32 && name in (:_atanh_terms, :_sin_terms, :_cos_terms) && continue  # fits below
    @eval const $(Symbol(name, T)) = $T.($name($T))
    @eval $(Symbol(name, :_of))(::Type{$T}) = $(Symbol(name, T))
end

# Adding 1.5·2^(mantissa bits) rounds to an integer and leaves it in the low bits.
_magic(::Type{Float32}) = 1.5f0 * 2.0f0^23
_magic(::Type{Float64}) = 1.5 * 2.0^52
_mantissa_bits(::Type{Float32}) = 23
_mantissa_bits(::Type{Float64}) = 52
_exponent_bias(::Type{Float32}) = Int32(127)
_exponent_bias(::Type{Float64}) = Int64(1023)
# ln 2 in two parts, the first with enough trailing zeros that n·ln2_high is exact
_ln2_high(::Type{Float32}) = 0.693359375f0
_ln2_low(::Type{Float32}) = Float32(log(big(2)) - big(0.693359375f0))
_ln2_high(::Type{Float64}) = reinterpret(Float64, 0x3fe62e42fee00000)
_ln2_low(::Type{Float64}) = Float64(log(big(2)) - big(reinterpret(Float64, 0x3fe62e42fee00000)))
for name in (:_ln2_high, :_ln2_low), T in (:Float32, :Float64)
    @eval const $(Symbol(name, T)) = $name($T)
    @eval $(Symbol(name, :_of))(::Type{$T}) = $(Symbol(name, T))
end

"2ⁿ and exp(r) − 1 for x = n ln 2 + r; |x| must not overflow 2ⁿ."
@inline function exp_parts(x::V) where {W,T<:Real32or64,V<:Vec{W,T}}
    magic = vconst(V, _magic(T))
    shifted = vfma(x, vconst(V, 1.4426950408889634), magic)
    n = vsub(shifted, magic)
    r = vfma(n, vconst(V, -_ln2_high_of(T)), x)
    r = vfma(n, vconst(V, -_ln2_low_of(T)), r)
    bits = vshl(vadd(vbits(shifted), splat(Vec{W,intof(T)}, _exponent_bias(T))), Val(_mantissa_bits(T)))
    vfrombits(T, bits), vmul(r, polynomial(r, _expm1_terms_of(T)))
end

"exp(x) for |x| <= 80 (Float32) or 700 (Float64)."
@inline function vexp(x::V) where {V<:Vec}
    scale, p = exp_parts(x)
    vfma(scale, p, scale)
end

"Exponent e and m − 1 of u = 2ᵉ m for normal, positive u."
@inline function log_parts(u::V) where {W,T<:Real32or64,V<:Vec{W,T}}
    I = intof(T)
    offset = reinterpret(I, T(0.7071067811865476))
    shifted = vadd(vbits(u), splat(Vec{W,I}, -offset))
    exponent = vfloat(T, vashr(shifted, Val(_mantissa_bits(T))))
    fraction = vand(shifted, splat(Vec{W,I}, (one(I) << _mantissa_bits(T)) - one(I)))
    exponent, vsub(vfrombits(T, vadd(fraction, splat(Vec{W,I}, offset))), vconst(V, 1))
end

# Least maximal error fits in single precision: (log(1 + f) − f + f²/2)/f³ on [√½ − 1, √2 − 1] to 3e-8 of f,
# (sin(y)/y − 1)/y² and (cos(y) − 1 + y²/2)/y⁴ in y² on [0, π/4] to 4e-9 and 1e-10.
const LOG32 = (0.33333858f0, -0.25001747f0, 0.19965395f0, -0.16565638f0, 0.14877009f0, -0.14350172f0, 0.08917674f0)
const SIN32 = (-0.16666655f0, 0.0083321781f0, -0.00019517297f0)
const COS32 = (0.041666647f0, -0.0013887368f0, 2.4438447f-5)

"log(u) for normal, positive u."
@inline function vlog(u::V) where {W,V<:Vec{W,Float64}}
    exponent, f = log_parts(u)
    s = vdiv(f, vadd(f, vconst(V, 2)))
    tail = vmul(s, polynomial(vmul(s, s), _atanh_terms_of(Float64)))
    vfma(exponent, vconst(V, _ln2_high_of(Float64)), vfma(exponent, vconst(V, _ln2_low_of(Float64)), tail))
end
@inline function vlog(u::V) where {W,V<:Vec{W,Float32}}
    exponent, f = log_parts(u)
    tail = vfma(vmul(f, f), vfma(f, polynomial(f, LOG32), vconst(V, -0.5)), f)
    vfma(exponent, vconst(V, log(2)), tail)
end

@inline function sin_cos_octant(y::V) where {W,V<:Vec{W,Float64}}
    y2 = vmul(y, y)
    vmul(y, polynomial(y2, _sin_terms_of(Float64))), polynomial(y2, _cos_terms_of(Float64))
end
@inline function sin_cos_octant(y::V) where {W,V<:Vec{W,Float32}}
    y2 = vmul(y, y)
    s = vfma(vmul(y, y2), polynomial(y2, SIN32), y)
    s, vfma(y2, vfma(y2, polynomial(y2, COS32), vconst(V, -0.5)), vconst(V, 1))
end

"cos and sin of π·x/2³¹, x a signed 32-bit integer."
@inline function vcossin(::Type{T}, x::Vec{W,Int32}) where {W,T<:Real32or64}
    V, I = Vec{W,T}, Vec{W,Int32}
    quadrant = vadd(x, splat(I, Int32(1) << 29))  # its two top bits
    rest = vashr(vshl(x, Val(2)), Val(2))
    y = vmul(vfloat(T, rest), vconst(V, pi / 2^31))
    s, c = sin_cos_octant(y)
    cosine = vflipsign(vselectbit(quadrant, Val(30), s, c), vadd(quadrant, splat(I, Int32(1) << 30)))
    sine = vflipsign(vselectbit(quadrant, Val(30), c, s), quadrant)
    cosine, sine
end

# tanh(x) ≈ x P(x²)/Q(x²) on |x| <= 9.02, beyond which it is 1 in single precision: fitted for least relative error by
# iterated, reweighted least squares, then rounded so that the error of the Float32 evaluation below is least over all floats: 2.8e-7.
const TANH_P = (1.0f0, 0.13379674f0, 0.0034939789f0, 2.0582582f-5, 1.3317813f-8)
const TANH_Q = (1.0f0, 0.46712992f0, 0.025870863f0, 0.00032830032f0, 7.7614953f-7)

"tanh(x); single precision: absolute error below 3e-7."
@inline function vtanh(x::V) where {W,V<:Vec{W,Float32}}
    limit = vconst(V, 9.02f0)
    y = vmax(vmin(x, limit), vsub(vconst(V, 0), limit))
    y2 = vmul(y, y)
    ratio = vdiv(vmul(y, polynomial(y2, TANH_P)), polynomial(y2, TANH_Q))
    vmax(vmin(ratio, vconst(V, 1)), vconst(V, -1))
end

"tanh(x), as (exp(2|x|) − 1)/(exp(2|x|) + 1), to rounding."
@inline function vtanh(x::V) where {W,V<:Vec{W,Float64}}
    y = vmin(vabs(x), vconst(V, 20))  # beyond, tanh rounds to ±1
    scale, p = exp_parts(vadd(y, y))
    m = vfma(scale, p, vsub(scale, vconst(V, 1)))
    vcopysign(vdiv(m, vadd(m, vconst(V, 2))), x)
end

_exp_limit(::Type{Float32}) = 80.0f0
_exp_limit(::Type{Float64}) = 700.0

"exp(−|x|), flushed to exp(−limit)."
@inline function vexp_negative(x::V) where {W,T,V<:Vec{W,T}}
    vexp(vmax(vsub(vconst(V, 0), vabs(x)), vconst(V, -_exp_limit(T))))
end

"1/(1 + exp(−x))."
@inline function vsigmoid(x::V) where {W,T,V<:Vec{W,T}}
    e = vexp_negative(x)
    small = vdiv(e, vadd(vconst(V, 1), e))  # of −|x|; exact also where it is tiny
    positive = vpositive(x)
    # x > 0: 1 − small, else small
    vfma(positive, vsub(vconst(V, 1), vadd(small, small)), small)
end

"log(1 + exp(x))."
@inline function vsoftplus(x::V) where {W,T,V<:Vec{W,T}}
    e = vexp_negative(x)
    s = vdiv(e, vadd(vconst(V, 2), e))
    vfma(s, polynomial(vmul(s, s), _log1p_terms_of(T)), vmax(x, vconst(V, 0)))
end
